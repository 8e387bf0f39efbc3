"""The many types that Arrow has for the same values, brought down to a few. Imports pyarrow: import it where that is needed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pyarrow import compute, types

FLOATS_END = 1 << 53  # from here on floats leave integers out


def plain(column: pa.Array) -> pa.Array:
    """The same values: texts and bytes of any layout as `string` (which may then be no UTF-8), dictionaries, runs and extension
    types as what they hold. Other types stay.
    """
    if isinstance(column, pa.ExtensionArray):
        return plain(column.storage)
    if isinstance(column, pa.DictionaryArray):
        return plain(column.dictionary_decode())
    if types.is_run_end_encoded(column.type):
        return plain(compute.call_function("run_end_decode", [column]))
    if is_binary(column.type):
        return column.cast(pa.binary()).view(pa.string())
    return column.cast(pa.string()) if types.is_large_string(column.type) or types.is_string_view(column.type) else column


def plain_type(kind: pa.DataType) -> pa.DataType:
    """That of what `plain` gives."""
    return plain(pa.nulls(0, kind)).type


def is_binary(kind: pa.DataType) -> bool:
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or types.is_fixed_size_binary(kind)


def is_number(kind: pa.DataType) -> bool:
    """Of which whole numbers may be made."""
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


def whole_numbers(column: pa.Array) -> pa.Array | None:
    """A column of numbers without nulls as integers; None where one of them is not whole, or is so large that its type does not
    hold its neighbours (floats from 2^53 on), or does not fit int64.
    """
    if types.is_integer(column.type):
        return column
    if types.is_floating(column.type) and not (np.abs(column.to_numpy(zero_copy_only=False)) < FLOATS_END).all():
        return None
    try:
        return compute.cast(column, pa.int64())
    except pa.ArrowInvalid:
        return None
