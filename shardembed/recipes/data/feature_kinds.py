"""Columns of features: numbers, labels, lists of ids, and hexadecimal categories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.config.arrow_types import plain
from shardembed.recipes.data.any_ids import absent_as_nulls, is_absent
from shardembed.recipes.data.bad import short, text_of
from shardembed.recipes.data.kinds import Kind, Said, bytes_of
from shardembed.recipes.data.lists import Lists, Values
from shardembed.recipes.data.wanted import MISSING

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
CATEGORY = re.compile(r"[0-9a-fA-F]{1,8}")
CATEGORIES = re.compile(rb"[0-9a-fA-F]{1,8}(?:\n[0-9a-fA-F]{1,8})*")
LABELS = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
BLANKS = " \t"
LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view, pa.types.is_large_list_view)


def _numbers_of_text(column: pa.Array) -> np.ndarray | None:
    try:
        found = compute.cast(column, pa.float64())
    except pa.ArrowInvalid:
        try:
            found = compute.cast(absent_as_nulls(column), pa.float64())
        except pa.ArrowInvalid:
            return None
    values = _float32(found)
    # A missing one is null by now; a text of nan or inf is for `_number_problem`, like one that is too large.
    usable = np.isfinite(values) | found.is_null().to_numpy(zero_copy_only=False)
    return values if usable.all() else None


def _numbers_of_numbers(column: pa.Array) -> np.ndarray | None:
    if pa.types.is_null(column.type):
        return np.full(len(column), np.nan, np.float32)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values = _float32(compute.cast(column, pa.float64(), safe=False))
    return None if np.isinf(values).any() else values


def _float32(column: pa.Array) -> np.ndarray:
    with np.errstate(over="ignore"):
        return column.to_numpy(zero_copy_only=False).astype(np.float32)  # NaN for null


def _number_problem(value: object) -> Said:
    if is_absent(value):
        return None
    text = text_of(value)
    if isinstance(value, str | bytes) and not NUMBER.fullmatch(text):
        return "no number", f"{short(text)!r} is no number; leave missing ones empty"
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(np.float32(float(text if isinstance(value, str | bytes) else value))))  # type: ignore[arg-type]
    return None if finite else ("no number", f"{short(text)} is infinite in 32 bits; leave missing ones empty")


def _numbers(values: Sequence[object]) -> np.ndarray:
    return np.array([np.nan if is_absent(value) else float(text_of(value)) for value in values], np.float64).astype(np.float32)


def _labels_of_text(column: pa.Array) -> np.ndarray | None:
    coded = column.dictionary_encode()
    found = [_label(value) for value in coded.dictionary.view(pa.binary()).to_pylist()[: len(LABELS) * 4]]
    if len(found) < len(coded.dictionary) or None in found:
        return None
    return np.array(found, np.int8)[coded.indices.to_numpy()]


def _labels_of_numbers(column: pa.Array) -> np.ndarray | None:
    if column.null_count or pa.types.is_null(column.type):
        return None if len(column) else np.empty(0, np.int8)
    if pa.types.is_boolean(column.type):
        return column.cast(pa.int8()).to_numpy()
    values = compute.cast(column, pa.float64(), safe=False).to_numpy()
    return values.astype(np.int8) if ((values == 0) | (values == 1)).all() else None


def _label(value: object) -> int | None:
    if isinstance(value, str | bytes):
        return LABELS.get((value.decode("utf-8", "replace") if isinstance(value, bytes) else value).lower())
    return int(value) if value in (0, 1) else None  # type: ignore[call-overload]


def _label_problem(value: object) -> Said:
    if _label(value) is not None:
        return None
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    shown = "a missing value" if text is None or text == "" or text != text else short(repr(text))
    return "no label", f"{shown} is no label, which is 0 or 1"


def _labels(values: Sequence[object]) -> np.ndarray:
    return np.array([_label(value) for value in values], np.int8)


def _categories_of_text(column: pa.Array) -> np.ndarray | None:
    coded = column.dictionary_encode()
    texts = coded.dictionary.view(pa.binary()).to_pylist()
    there = [text for text in texts if text]
    joined = b"\n".join(there)  # one match for all
    if there and (not CATEGORIES.fullmatch(joined) or joined.count(b"\n") != len(there) - 1):
        return None
    distinct = np.array([int(text, 16) if text else MISSING for text in texts], np.int64)
    return distinct[coded.indices.to_numpy()] if len(distinct) else np.empty(0, np.int64)


def _categories_of_numbers(column: pa.Array) -> np.ndarray | None:
    if pa.types.is_null(column.type):
        return np.full(len(column), MISSING)
    values = compute.fill_null(column, 0).to_numpy(zero_copy_only=False)
    absent = column.is_null().to_numpy(zero_copy_only=False)
    if len(values) and (int(values.max()) > np.iinfo(np.int64).max or int(values.min()) == MISSING):
        return None
    return np.where(absent, MISSING, values.astype(np.int64))


def _category_problem(value: object) -> Said:
    if isinstance(value, int):
        fits = MISSING < value <= np.iinfo(np.int64).max
        return None if fits else ("no category", f"{value} is no category: integers must be above -2^63 and below 2^63")
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not text or (isinstance(text, str) and CATEGORY.fullmatch(text)):
        return None
    said = "is no category, which is 1 to 8 hexadecimal digits; leave missing ones empty"
    return "no category", f"{short(repr(text))} {said}"


def _categories(values: Sequence[object]) -> np.ndarray:
    return np.array([value if isinstance(value, int) else int(value, 16) if value else MISSING for value in values], np.int64)  # type: ignore[call-overload]


def lists(element: Kind, separator: str | None) -> Kind:
    """Lists of ids, each of the kind `element`. What is missing in a list is left out of it. separator: of those that are texts."""
    return Kind(
        partial(_lists_of_text, element=element, separator=separator),
        partial(_lists_of_lists, element=element),
        partial(_list_problem, element=element, separator=separator),
        partial(_lists, element=element, separator=separator),
        text=element.text,
    )


def split(column: pa.Array, separator: str | None) -> tuple[pa.Array, np.ndarray]:
    """Of texts, the elements of all, without blanks around and empty ones, and how many each has, int64 `[n]`."""
    parts = compute.call_function("split_pattern", [column], compute.SplitPatternOptions(separator)) if separator else None
    elements = column if parts is None else parts.flatten()
    counts = np.ones(len(column), np.int64) if parts is None else _lengths(parts)
    data, _ = bytes_of(elements)
    if (data == ord(" ")).any() or (data == ord("\t")).any():
        elements = compute.call_function("utf8_trim", [elements], compute.TrimOptions(BLANKS))
    return _present(elements, counts)


def _lengths(lists: pa.Array) -> np.ndarray:
    lengths = compute.call_function("list_value_length", [lists])
    return compute.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _present(elements: pa.Array, counts: np.ndarray) -> tuple[pa.Array, np.ndarray]:
    """Without the ones that are missing."""
    there = elements.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_string(elements.type):
        _, offsets = bytes_of(elements)
        there &= np.diff(offsets) > 0
    elif pa.types.is_floating(elements.type):
        there &= ~np.isnan(elements.to_numpy(zero_copy_only=False))
    if there.all():
        return elements, counts
    return elements.filter(pa.array(there)), _counted(there, counts)


def _counted(there: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How many each list keeps, int64 `[n]`, of elements of which bool `there` are kept."""
    sums, ends = np.append(0, np.cumsum(there)), np.cumsum(counts)
    return sums[ends] - sums[ends - counts]


def _lists_of_text(column: pa.Array, element: Kind, separator: str | None) -> Lists | None:
    if _is_printed(column):
        return None
    try:
        elements, counts = split(column, separator)
    except pa.ArrowInvalid:  # no UTF-8
        return None
    return _of(element.of(elements), counts)


def _lists_of_lists(column: pa.Array, element: Kind) -> Lists | None:
    if not is_list(column.type):
        if pa.types.is_null(column.type):
            return Lists.empty(len(column))
        elements, counts = column, np.ones(len(column), np.int64)
    else:
        counts = _lengths(column)
        if pa.types.is_fixed_size_list(column.type) and column.null_count:
            column = column.filter(column.is_valid())
        elements = column.flatten()
    elements, counts = _present(plain(elements), counts)
    return _of(element.of(elements), counts)


def _of(values: Values | None, counts: np.ndarray) -> Lists | None:
    if values is None:
        return None
    assert isinstance(values, np.ndarray)
    there = values != MISSING  # texts that stand for no number, such as NA
    return Lists(values, counts) if there.all() else Lists(values[there], _counted(there, counts))


def is_list(kind: pa.DataType) -> bool:
    """Any of Arrow's kinds of lists."""
    return any(one(kind) for one in LISTS)


def _is_printed(column: pa.Array) -> bool:
    """One of them is a list as Python prints it."""
    data, offsets = bytes_of(column)
    if not (data == ord("[")).any():
        return False
    lengths = np.diff(offsets)
    starts, ends = offsets[:-1][lengths > 1], offsets[1:][lengths > 1]
    return bool(((data[starts] == ord("[")) & (data[ends - 1] == ord("]"))).any())


def _elements(value: object, separator: str | None) -> list[object]:
    if value is None:
        return []
    if isinstance(value, list):
        return [one for one in value if text_of(one)]
    if not isinstance(value, str | bytes):
        return [value] if text_of(value) else []
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    parts = (part.strip(BLANKS) for part in (text.split(separator) if separator else [text]))
    return [part for part in parts if part]


def _list_problem(value: object, element: Kind, separator: str | None) -> Said:
    if isinstance(value, str | bytes):
        text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        if len(text) > 1 and text[0] == "[" and text[-1] == "]":
            said = "is a list as Python prints it; put a separator between its values, without brackets, or write Parquet"
            return "printed list", f"{short(text)!r} {said}"
    found = (element.problem(one) for one in _elements(value, separator))
    return next(filter(None, found), None)


def _lists(values: Sequence[object], element: Kind, separator: str | None) -> Lists:
    parts = [_elements(value, separator) for value in values]
    found = _of(element.slow([one for part in parts for one in part]), np.array([len(part) for part in parts], np.int64))
    assert found is not None
    return found


NUMBERS = Kind(_numbers_of_text, _numbers_of_numbers, _number_problem, _numbers)
LABELLED = Kind(_labels_of_text, _labels_of_numbers, _label_problem, _labels)
HEXADECIMAL = Kind(_categories_of_text, _categories_of_numbers, _category_problem, _categories)
