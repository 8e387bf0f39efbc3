"""Ids of Arrow's columns, hashed where they lie. Imports pyarrow: import it where that is needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute, types

from shardembed.config.arrow_types import is_binary
from shardembed.errors import DtypeError
from shardembed.inputs.names import Named
from shardembed.kernels.texts import Texts, xxh64

Missing = NDArray[np.bool_] | None
VIEWS = {"string_view": pa.large_string(), "binary_view": pa.large_binary()}


def read_column(values: Any, who: str) -> tuple[NDArray[np.int64], Missing, list[Named]]:
    """Of an array of Arrow's, or of what pandas or another library lends: the ids int64 `[n]` (of no meaning where a value is
    missing), which are missing, and the texts that occur.

    Raises:
        DtypeError: the values are neither integers nor texts, or no single column.
    """
    try:
        column = _column(values)
    except (pa.ArrowException, TypeError, KeyError) as error:
        raise DtypeError(f"{who}: a {type(values).__name__} cannot be read as one column of integers or texts: {error}") from error
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_read(chunk, who) for chunk in chunks]
    ids = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)]) if len(parts) != 1 else parts[0][0]
    missing = None
    if any(part[1] is not None for part in parts):
        missing = np.concatenate([np.zeros(len(part[0]), np.bool_) if part[1] is None else part[1] for part in parts])
    return ids, missing, [named for part in parts for named in part[2]]


def _column(values: Any) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    if type(values).__module__.startswith("pandas"):
        return pa.array(values, from_pandas=True)  # with NaN as null
    return pa.chunked_array(values)


def _read(array: pa.Array, who: str) -> tuple[NDArray[np.int64], Missing, list[Named]]:
    kind = array.type
    if isinstance(array, pa.DictionaryArray):
        return _of_dictionary(array, who)
    if types.is_run_end_encoded(kind):
        return _read(compute.call_function("run_end_decode", [array]), who)
    missing = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
    if types.is_null(kind):
        return np.zeros(len(array), np.int64), missing, []
    if types.is_integer(kind):
        filled = compute.fill_null(array, 0) if array.null_count else array
        return filled.to_numpy(zero_copy_only=False).astype(np.int64), missing, []
    if str(kind) in VIEWS or is_binary(kind) or types.is_string(kind) or types.is_large_string(kind):
        texts = _texts(array.cast(VIEWS[str(kind)]) if str(kind) in VIEWS else array)
        ids = xxh64(texts).view(np.int64)
        return ids, missing, [Named(texts, ids, missing)]
    hint = "; read integers with gaps as Int64, not as floats" if types.is_floating(kind) else ""
    raise DtypeError(f"{who}: values must be integers or texts, not {kind}{hint}")


def _of_dictionary(array: pa.DictionaryArray, who: str) -> tuple[NDArray[np.int64], Missing, list[Named]]:
    """Each entry is hashed once, whether it occurs or not."""
    ids, missing, named = _read(array.dictionary, who)
    if not len(ids):
        return np.zeros(len(array), np.int64), np.ones(len(array), np.bool_) if len(array) else None, []
    indices = compute.fill_null(array.indices, 0).to_numpy(zero_copy_only=False)
    gone = array.indices.is_null().to_numpy(zero_copy_only=False) if array.indices.null_count else None
    if missing is not None:
        gone = missing[indices] if gone is None else gone | missing[indices]
    return ids[indices], gone, named


def _texts(array: pa.Array) -> Texts:
    if not len(array):
        return Texts.of([])
    if types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        data, offsets = array.buffers()[1], (np.arange(len(array) + 1) + array.offset) * width
    else:
        _, ends, data = array.buffers()
        large = types.is_large_string(array.type) or types.is_large_binary(array.type)
        dtype = np.dtype(np.int64 if large else np.int32)
        offsets = np.frombuffer(ends, dtype, len(array) + 1, array.offset * dtype.itemsize).astype(np.int64)
    return Texts(np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), offsets)
