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


def prefetch(builder: Any, address: Any) -> None:
    """Ask for the cache line at a pointer."""
    byte, number = builder.bitcast(address, ir.IntType(8).as_pointer()), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte.type, number, number, number])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [byte, number(0), number(3), number(1)])  # a read, for all caches, of data


def _fetch_type(typing_context: Any, first: Any, size: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stop, pointer = builder.add(*arguments), ir.IntType(8).as_pointer()
        first, line = arguments[0], arguments[0].type(CACHE_LINE)
        with cgutils.for_range_slice(builder, first, stop, line, first.type) as (address, _):
            prefetch(builder, builder.inttoptr(address, pointer))
        # What is fetched need not begin where a cache line does.
        prefetch(builder, builder.inttoptr(builder.sub(stop, first.type(1)), pointer))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _number_type(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), generate


# (address to, address from, bytes); the two may not overlap.
copy_bytes: Any = intrinsic(_copy_type)
# (address, bytes): asks for the cache lines of so many bytes, of which there must be one.
fetch_bytes: Any = intrinsic(_fetch_type)
# (address): the int64 that lies there.
number_at: Any = intrinsic(_number_type)
