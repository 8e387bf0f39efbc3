"""Ids of tables that take any: whole numbers of 64 bits, with a sign or without, as they are, and texts by `se.hash64`.

Whether a column of a text file holds the one or the other is for a sample of its values to say: one that is no whole number of 64
bits makes all of them texts, and so does a leading zero, for 007 and 7 are two ids of a text and one of a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.inputs.hash64 import hash64
from shardembed.inputs.names import Names
from shardembed.recipes.data.bad import MAX_USER, MIN_USER, SHOWN, int64_problem, short, text_of, whole
from shardembed.recipes.data.kinds import DIGITS_ONLY, MINUS, ZERO, Kind, Said, bytes_of, int64_of_numbers, without_fractions
from shardembed.recipes.data.wanted import MISSING

MOST = (1 << 64) - 1
REPLACED = "\ufffd"
ABSENT = ("nan", "NaN", "NAN", "NA", "N/A", "null", "NULL", "None")  # in a column of numbers as good as an empty field
WHOLE_ID = r"^-?(0|[1-9][0-9]*)(\.0*)?$"


def are_texts(values: pa.Array) -> bool | None:
    """Whether a column that begins with `values`, as a text file has them, holds texts; None where there are none."""
    values = values.filter(compute.call_function("is_in", [values], compute.SetLookupOptions(_absent())).to_numpy(False) == 0)
    if not len(values):
        return None
    try:
        whole_ones = compute.call_function("match_substring_regex", [values], compute.MatchSubstringOptions(WHOLE_ID))
    except pa.ArrowInvalid:  # no UTF-8
        return True
    if not whole_ones.to_numpy(False).all():
        return True
    return _int64s_of_text(values) is None


def integers(name: str, optional: bool) -> Kind:
    """Whole numbers. optional: some may be missing, and become MISSING; name: of the column."""
    return Kind(
        partial(_integers_of_text, optional=optional),
        partial(_integers_of_numbers, optional=optional),
        partial(_integer_problem, name=name, optional=optional),
        _integers,
    )


def texts(names: Names | None, optional: bool) -> Kind:
    """Texts, whose ids are those of `se.hash64`, and numbers as if they were written as texts; names: keeps which has which."""
    return Kind(
        partial(_hashed, names=names, optional=optional),
        partial(_hashed_numbers, names=names, optional=optional),
        partial(_text_problem, optional=optional),
        partial(_hash, names=names),
        text=True,
    )


def is_absent(value: object) -> bool:
    """Of a column of numbers: there is none, or one of the texts that say so."""
    text = text_of(value)
    return not text or text in ABSENT


def absent_as_nulls(column: pa.Array) -> pa.Array:
    """Of a column of texts of numbers."""
    return without(column, compute.call_function("is_in", [column], compute.SetLookupOptions(_absent())))


def without(column: pa.Array, where: pa.Array) -> pa.Array:
    """The column, with nulls `where` that is true."""
    return compute.call_function("if_else", [where, pa.scalar(None, column.type), column])


def _absent() -> pa.Array:
    return pa.array(["", *ABSENT])


def _hashed(column: pa.Array, names: Names | None, optional: bool) -> np.ndarray | None:
    data, offsets = bytes_of(column)
    if len(data) and data.max() > 127 and not _is_utf8(column):
        return None
    empty = offsets[1:] == offsets[:-1]
    if not empty.any():
        return hash64(column, names=names)
    if not optional:
        return None
    return hash64(without(column, pa.array(empty)), null=MISSING, names=names)


def _hashed_numbers(column: pa.Array, names: Names | None, optional: bool) -> np.ndarray | None:
    """A column of texts as a dictionary, or of numbers, whose decimal digits are hashed."""
    if pa.types.is_null(column.type):
        return np.full(len(column), MISSING) if optional or not len(column) else None
    if column.null_count and not optional:
        return None
    column = column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column
    there = column.drop_null()
    whole_ones = there if pa.types.is_integer(there.type) else None
    if whole_ones is None:
        found = int64_of_numbers(there)
        if found is None:
            return None
        whole_ones = pa.array(found)
    ids = np.full(len(column), MISSING)
    ids[column.is_valid().to_numpy(zero_copy_only=False)] = hash64(whole_ones.cast(pa.string()), names=names)
    return ids


def _hash(values: Sequence[object], names: Names | None) -> np.ndarray:
    said = [value if isinstance(value, str | bytes) else text_of(value) for value in values]
    encoded = [value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value for value in said]
    if not encoded:
        return np.empty(0, np.int64)
    return hash64([value or None for value in encoded], null=MISSING, names=names)


def _is_utf8(column: pa.Array) -> bool:
    """And has none of the signs that stand for what is no UTF-8, since lines that are read one by one have these in its place."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    found = compute.call_function("match_substring", [column], compute.MatchSubstringOptions(REPLACED))
    return not found.to_numpy(zero_copy_only=False).any()


def _text_problem(value: object, optional: bool) -> Said:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value if isinstance(value, str) else text_of(value)
    if not text:
        return None if optional else ("missing", "the value is missing; remove the row or fill it in")
    return ("not UTF-8", f"{short(text)!r} is not UTF-8; convert the file") if REPLACED in text else None


def _integers_of_text(column: pa.Array, optional: bool) -> np.ndarray | None:
    if optional:
        column = absent_as_nulls(column)
        if column.null_count:
            found = np.full(len(column), MISSING)
            there = _int64s_of_text(column.drop_null())
            if there is None:
                return None
            found[column.is_valid().to_numpy(zero_copy_only=False)] = there
            return found
    return _int64s_of_text(column)


def _int64s_of_text(column: pa.Array) -> np.ndarray | None:
    """None also where there are leading zeros."""
    stripped = without_fractions(column)
    if stripped is None or _has_leading_zero(*bytes_of(stripped)):
        return None
    for kind in (pa.int64(), pa.uint64()):
        try:
            return compute.cast(stripped, kind).to_numpy(zero_copy_only=False).view(np.int64)
        except pa.ArrowInvalid:
            continue
    return None


def _has_leading_zero(data: np.ndarray, offsets: np.ndarray) -> bool:
    """One of the texts whose bytes these are begins with a zero, behind its sign if it has one, and goes on."""
    if not len(data):
        return False
    last = len(data) - 1
    signs = data[np.minimum(offsets[:-1], last)] == MINUS
    first = offsets[:-1] + signs
    return bool(((data[np.minimum(first, last)] == ZERO) & (offsets[1:] - first > 1)).any())


def _integers_of_numbers(column: pa.Array, optional: bool) -> np.ndarray | None:
    if pa.types.is_null(column.type):
        return np.full(len(column), MISSING) if optional or not len(column) else None
    if pa.types.is_floating(column.type):
        column = without(column, compute.call_function("is_nan", [column]))
    if not column.null_count or not optional:
        return int64_of_numbers(column, MIN_USER, MOST)
    found = np.full(len(column), MISSING)
    there = int64_of_numbers(column.drop_null(), MIN_USER, MOST)
    if there is None:
        return None
    found[column.is_valid().to_numpy(zero_copy_only=False)] = there
    return found


def _integer_problem(value: object, name: str, optional: bool) -> Said:
    if is_absent(value):
        return None if optional else ("missing", "the value is missing; remove the row or fill it in")
    text = text_of(value)
    if not DIGITS_ONLY.fullmatch(text):
        said = f"the first rows have whole numbers, so all must; if they are texts, say data.texts: [{name}]"
        return "not an integer", f"{short(text)!r} is not an integer: {said}"
    if isinstance(value, str | bytes) and len(text.lstrip("-")) > 1 and text.lstrip("-")[0] == "0":
        said = f"007 and 7 are one number; if they are two ids, say data.texts: [{name}]"
        return "leading zero", f"{short(text)!r} begins with a zero: {said}"
    if len(text) <= SHOWN and MAX_USER < int(text) <= MOST:
        return None
    return int64_problem(value, f"if they are texts, say data.texts: [{name}]")


def _integers(values: Sequence[object]) -> np.ndarray:
    return np.array([MISSING if is_absent(value) else _wrapped(whole(value)) for value in values], np.int64)


def _wrapped(number: int) -> int:
    return number - (1 << 64) if number > MAX_USER else number
