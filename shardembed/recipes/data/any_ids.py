"""Ids of tables that take any: whole numbers of 64 bits, with a sign or without, as they are, and texts by `se.hash64`."""

from __future__ import annotations

from functools import partial

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.inputs.hash64 import hash64
from shardembed.inputs.names import Names
from shardembed.recipes.data.bad import MAX_USER, MIN_USER, SHOWN, int64_problem, short, text_of, whole
from shardembed.recipes.data.kinds import DIGITS_ONLY, Kind, int64_of_text

MOST = (1 << 64) - 1
REPLACED = "\ufffd"


def ids_like(text: str, names: Names | None = None) -> Kind:
    """The kind of a column of ids of which `text` is the first value: whole numbers, or texts; names: of the latter."""
    return texts(names) if text and not DIGITS_ONLY.fullmatch(text_of(text)) else INTEGER


def texts(names: Names | None = None) -> Kind:
    """Texts, whose ids are those of `se.hash64`; names: keeps which has which."""

    return Kind(partial(_hashed, names=names), _text_problem, partial(_hash, names=names), text=True)


def _hashed(column: pa.Array, names: Names | None) -> np.ndarray | None:
    empty = compute.call_function("binary_length", [column]).to_numpy(zero_copy_only=False) == 0
    return None if empty.any() or not _is_utf8(column) else hash64(column, names=names)[None]


def _hash(value: object, names: Names | None) -> tuple[int]:
    return (int(hash64([value], names=names)[0]),)


def _is_utf8(column: pa.Array) -> bool:
    """And has none of the signs that stand for what is no UTF-8, since lines that are read one by one have these in its place."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        return False
    found = compute.call_function("match_substring", [column], compute.MatchSubstringOptions(REPLACED))
    return not found.to_numpy(zero_copy_only=False).any()


def _text_problem(value: object) -> tuple[str, str] | None:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text:
        return "missing", "the value is missing; remove the row or fill it in"
    return ("not UTF-8", f"{short(text)!r} is not UTF-8; convert the file") if REPLACED in text else None


def _integers(column: pa.Array) -> np.ndarray | None:
    found = int64_of_text(column)
    if found is not None:
        return found
    try:
        return compute.cast(column, pa.uint64()).to_numpy(zero_copy_only=False).view(np.int64)[None]
    except pa.ArrowInvalid:
        return None


def _integer_problem(value: object) -> tuple[str, str] | None:
    text = text_of(value)
    if text and not DIGITS_ONLY.fullmatch(text):
        said = "the first row has a whole number, so all must; put ids of which some are digits into a Parquet column of texts"
        return "not an integer", f"{short(text)!r} is not an integer: {said}"
    if len(text) <= SHOWN and text and MAX_USER < int(text) <= MOST:
        return None
    return int64_problem(value, "ids have 64 bits")


def _integer(value: object) -> tuple[int]:
    number = whole(value)
    return (number - (1 << 64) if number > MAX_USER else number,)


INTEGER = Kind(_integers, _integer_problem, _integer, MIN_USER, MOST)
