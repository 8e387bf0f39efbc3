"""How these kernels are compiled, and what Numba has no word for: llvm.prefetch, and copies between addresses."""

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


def reassociated(kernel: Any) -> Any:
    """As `compiled`; sums may be made in another order than they are written in."""
    return kept_on_disk(numba.njit(**OPTIONS, fastmath={"reassoc"})(kernel))


def _fetch_type(typing_context: Any, flat: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [address, number(0), number(3), number(1)])  # a read, for all caches, of data
        return context.get_dummy_value()

    return types.void(flat, types.int64), generate


# (flat array, index): asks for the cache line of an element that will be read and written soon.
_fetch: Any = intrinsic(_fetch_type)


def _copy_type(typing_context: Any, target: Any, source: Any, size: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        to, origin = (builder.inttoptr(address, ir.IntType(8).as_pointer()) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, origin, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


# (address to, address from, bytes); the two may not overlap.
copy_bytes: Any = intrinsic(_copy_type)


@compiled
def fetch_row(flat: Any, row: int, width: int) -> None:
    """Ask for a row of a matrix, given as `flat`, before it is needed."""
    step = CACHE_LINE // flat.itemsize
    first = row * width
    for column in range(0, width, step):
        _fetch(flat, first + column)
    # A row need not begin where a cache line does.
    _fetch(flat, first + width - 1)
