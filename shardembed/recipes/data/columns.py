"""Columns of Parquet files, whatever type they have there, as the values that a text file would give."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from shardembed.config.arrow_types import is_number, plain, plain_type, whole_numbers
from shardembed.recipes.data.kinds import CLOCK_TIME, WHOLE_TIME, Kind, clock_numbers, times_like

Wrong = dict[int, tuple[str, str]]  # what is wrong with values, by row


def holds_ids(kind: pa.DataType) -> bool:
    """A column of that type may hold ids; of nulls alone, which all are bad rows, too."""
    value = plain_type(kind)
    return is_number(value) or pa.types.is_string(value) or pa.types.is_null(value)


def holds_times(kind: pa.DataType) -> bool:
    return holds_ids(kind) or _is_clock(plain_type(kind))


def kind_of_times(column: pa.ChunkedArray | pa.Array) -> Kind | None:
    """How times are written that begin as `column` does; None where it has none."""
    value = plain_type(column.type)
    if _is_clock(value):
        return CLOCK_TIME
    if not pa.types.is_string(value):
        return None if pa.types.is_null(value) else WHOLE_TIME
    first = next(filter(None, (each.as_py() for each in column.drop_null())), None)
    return None if first is None else times_like(first.decode("utf-8", "replace") if isinstance(first, bytes) else first)


def values_of(column: pa.Array, kind: Kind) -> tuple[np.ndarray, Wrong]:
    """The values int64 `[numbers, n]`, 0 where there is no usable one, and what is wrong with these."""
    column = plain(column)
    if _is_clock(column.type):
        numbers, absent = clock_numbers(column)
        rows = np.flatnonzero(absent).tolist()
        return numbers, {row: _no_clock(column[row].is_valid) for row in rows}
    found = _fast(column, kind)
    return (found, {}) if found is not None else _slow(column, kind)


def _is_clock(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def _no_clock(valid: bool) -> tuple[str, str]:
    if valid:
        return "too large", "the time is more than 292,000 years away; is the unit of the column right?"
    return "missing", "the value is missing; remove the row or fill it in"


def _fast(column: pa.Array, kind: Kind) -> np.ndarray | None:
    """The values; None where one is unusable or might be."""
    if column.null_count or not len(column):
        return None
    if pa.types.is_string(column.type):
        return kind.fast(column)
    integers = whole_numbers(column)
    if integers is None:
        return None
    values = integers.to_numpy(zero_copy_only=False)
    # As Python's integers: numpy would compare those without a sign as floats.
    if int(values.min()) < kind.lowest or int(values.max()) > kind.highest:
        return None
    return values.astype(np.int64)[None]


def _slow(column: pa.Array, kind: Kind) -> tuple[np.ndarray, Wrong]:
    found = np.zeros((kind.numbers, len(column)), np.int64)
    wrong: Wrong = {}
    for row, value in enumerate((column.view(pa.binary()) if pa.types.is_string(column.type) else column).to_pylist()):
        problem = kind.problem(value)
        if problem is not None:
            wrong[row] = problem
        else:
            found[:, row] = kind.value(value)
    return found, wrong
