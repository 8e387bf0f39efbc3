"""Elements of flat arrays, without what Numba's own indexing adds: a look at whether an index counts from the end, and a count of
references for each view of a row. In the inner loops of the updates the two took longer than the memory.

A function that an inner loop calls must take numbers alone, or be one of these: arrays that it takes are counted.

An index is an int64 from 0 to below the array's size, which nobody checks; arrays that are not contiguous are refused when a
kernel is compiled. `..._each` do the same to every array of a tuple,
which may be empty; all arrays of a tuple are of one dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import cgutils, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from shardembed.kernels.numba.tools import CACHE_LINE, prefetch


def _check(*flats: Any) -> None:
    if not all(isinstance(flat, types.Array) and flat.ndim == 1 and flat.layout == "C" for flat in flats):
        raise TypingError(f"elements are read and written in contiguous arrays of one dimension, not in {flats}")


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index])


def _addresses(context: Any, builder: Any, kinds: Any, arrays: Any, index: Any) -> list[Any]:
    each = (builder.extract_value(arrays, i) for i in range(len(kinds)))
    return [_address(context, builder, kind, array, index) for kind, array in zip(kinds, each, strict=True)]


def _load_type(typing_context: Any, flat: Any, index: Any) -> Any:
    _check(flat)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_address(context, builder, flat, *arguments))

    return flat.dtype(flat, types.int64), generate


def _store_type(typing_context: Any, flat: Any, index: Any, value: Any) -> Any:
    _check(flat)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _address(context, builder, flat, *arguments[:2]))
        return context.get_dummy_value()

    return types.void(flat, types.int64, flat.dtype), generate


def _fetch_type(typing_context: Any, flat: Any, index: Any) -> Any:
    _check(flat)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, _address(context, builder, flat, *arguments))
        return context.get_dummy_value()

    return types.void(flat, types.int64), generate


def _values_type(flats: Any) -> Any:
    return types.Tuple([flat.dtype for flat in flats.types])


def _load_each_type(typing_context: Any, flats: Any, index: Any) -> Any:
    _check(*flats.types)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = [builder.load(address) for address in _addresses(context, builder, flats.types, *arguments)]
        return context.make_tuple(builder, signature.return_type, values)

    return _values_type(flats)(flats, types.int64), generate


def _store_each_type(typing_context: Any, flats: Any, index: Any, values: Any) -> Any:
    _check(*flats.types)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        for i, address in enumerate(_addresses(context, builder, flats.types, *arguments[:2])):
            builder.store(builder.extract_value(arguments[2], i), address)
        return context.get_dummy_value()

    return types.void(flats, types.int64, _values_type(flats)), generate


def _fetch_each_type(typing_context: Any, flats: Any, first: Any, count: Any) -> Any:
    _check(*flats.types)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays, first, count = arguments
        stop = builder.add(first, count)
        last = builder.sub(stop, first.type(1))  # a row need not begin where a cache line does
        for i, kind in enumerate(flats.types):
            array, step = builder.extract_value(arrays, i), first.type(max(1, CACHE_LINE * 8 // kind.dtype.bitwidth))
            with cgutils.for_range_slice(builder, first, stop, step, first.type) as (index, _):
                prefetch(builder, _address(context, builder, kind, array, index))
            prefetch(builder, _address(context, builder, kind, array, last))
        return context.get_dummy_value()

    return types.void(flats, types.int64, types.int64), generate


# (flat, index) -> element; (flat, index, element).
load: Callable[..., Any] = intrinsic(_load_type)
store: Callable[..., Any] = intrinsic(_store_type)
# (flat, index): asks for the cache line of an element that will be read or written soon.
fetch: Callable[..., Any] = intrinsic(_fetch_type)
# (flats, index) -> elements; (flats, index, elements).
load_each: Callable[..., Any] = intrinsic(_load_each_type)
store_each: Callable[..., Any] = intrinsic(_store_each_type)
# (flats, first, count): asks for the cache lines of so many neighbours, at least one, that will be read or written soon.
fetch_each: Callable[..., Any] = intrinsic(_fetch_each_type)
