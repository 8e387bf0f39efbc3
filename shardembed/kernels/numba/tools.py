"""How these kernels are compiled, and copies between addresses."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from shardembed.kernels.numba.cache import kept_on_disk

CACHE_LINE = 64  # bytes
# nogil: the other threads of a rank (prefetch, heartbeat) go on. No fastmath: a kernel gives the reference's bits.
OPTIONS: dict[str, Any] = {"nogil": True, "boundscheck": False, "error_model": "numpy"}


def compiled(kernel: Any) -> Any:
    return kept_on_disk(numba.njit(**OPTIONS)(kernel))


def called(kernel: Any) -> Any:
    """As `compiled`, for what is a part of other kernels and is kept with them."""
    return numba.njit(**OPTIONS)(kernel)


def reassociated(kernel: Any) -> Any:
    """As `compiled`; sums may be made in another order than they are written in."""
    return kept_on_disk(numba.njit(**OPTIONS, fastmath={"reassoc"})(kernel))


def _copy_type(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, origin = (builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, origin, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


# (address to, address from, bytes); the two may not overlap.
copy_bytes: Any = intrinsic(_copy_type)
