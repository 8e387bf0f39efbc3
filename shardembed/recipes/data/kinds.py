"""What a column holds, and how a value of it is read: all of a column at once, or one by one.

Numbers are whole and of at most 64 bits, however they are written: 37, 37.0, a Parquet float or decimal. Dates are two numbers:
microseconds since 1970, which any year of four digits has, and the nanoseconds beyond them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TypeAlias

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.config.arrow_types import whole_numbers
from shardembed.recipes.data.bad import (
    MAX_ID,
    MAX_USER,
    MIN_USER,
    int64_problem,
    problem_of,
    problem_of_user,
    short,
    text_of,
    whole,
)
from shardembed.recipes.data.lists import Values

Said: TypeAlias = "tuple[str, str] | None"  # (kind, sentence) of what is wrong with a value
DIGITS_ONLY = re.compile(r"-?[0-9]+")
DATE = re.compile(r"\d{4}-\d\d-\d\d", flags=re.ASCII)
CLOCK = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,9})0*)?)?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?)?", flags=re.ASCII
)
CLOCKS = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9:.]+(Z|[+-][0-9:]+)?)?$"  # most of what is none does not look like this
ZONED = re.compile(r"[T ].*(Z|[+-][0-9:]+)$")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
NANOSECONDS = 1000  # a microsecond
YEAR_ONE = -62_135_596_800_000_000  # microseconds since 1970
ZERO, MINUS, POINT = b"0-."


@dataclass(frozen=True)
class Kind:
    """How the values of a column are read. All ways that take a value make the same of it.

    Attributes:
        fast: all of a column of texts (`string`, maybe no UTF-8; empty where missing); None where one is unusable or might be.
        typed: likewise of a column of another type, as `arrow_types.plain` gives it, with nulls where missing.
        problem: what is wrong with one value, or None.
        slow: of values that have no problem.
        clock: its values are dates.
        text: its values are texts.
    """

    fast: Callable[[pa.Array], Values | None]
    typed: Callable[[pa.Array], Values | None]
    problem: Callable[[object], Said]
    slow: Callable[[Sequence[object]], Values]
    clock: bool = False
    text: bool = False

    def of(self, column: pa.Array) -> Values | None:
        """All of a plain column, or None."""
        if pa.types.is_string(column.type):
            return self.fast(filled(column) if column.null_count else column)
        return self.typed(column)


def filled(column: pa.Array) -> pa.Array:
    """Texts, empty where there is none."""
    return compute.fill_null(column.view(pa.binary()), b"").view(pa.string())


def bytes_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of texts: all their bytes uint8, and where each begins among these and the last ends, `[n + 1]`."""
    _, ends, data = column.buffers()
    if not len(column) or data is None:
        return np.empty(0, np.uint8), np.zeros(len(column) + 1, np.int32)
    offsets = np.frombuffer(ends, np.int32, len(column) + 1, column.offset * 4)
    return np.frombuffer(data, np.uint8)[offsets[0] : offsets[-1]], offsets - offsets[0]


def int64_of_text(column: pa.Array) -> np.ndarray | None:
    """Whole numbers of texts; None where one is none, or does not fit."""
    column = without_fractions(column)
    if column is None:
        return None
    try:
        return compute.cast(column, pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        return None


def without_fractions(column: pa.Array) -> pa.Array | None:
    """Texts of digits, with zeros behind points gone; None where one has anything else, which pyarrow might take for a number."""
    data, _ = bytes_of(column)
    digits = data - np.uint8(ZERO) <= 9
    if digits.all():
        return column
    others = np.unique(data[~digits])
    if not np.isin(others, (MINUS, POINT)).all():
        return None
    if POINT not in others:
        return column
    options = compute.ReplaceSubstringOptions(r"^(-?[0-9]+)\.0*$", r"\1")
    return compute.call_function("replace_substring_regex", [column], options)


def int64_of_numbers(column: pa.Array, lowest: int = MIN_USER, highest: int = MAX_USER) -> np.ndarray | None:
    """Whole numbers of a column of numbers, as the 64 bits of int64; None where one is missing, no whole one or beyond."""
    if column.null_count:
        return None
    if not len(column):
        return np.empty(0, np.int64)
    if pa.types.is_boolean(column.type):
        return column.cast(pa.int8()).to_numpy().astype(np.int64)
    integers = whole_numbers(column)
    if integers is None:
        return None
    values = integers.to_numpy(zero_copy_only=False)
    # As Python's integers: numpy would compare those without a sign as floats.
    if int(values.min()) < lowest or int(values.max()) > highest:
        return None
    return values.astype(np.int64)


def _integers(values: Sequence[object]) -> np.ndarray:
    return np.array([whole(value) for value in values], np.int64)


def _rows_of_text(column: pa.Array) -> np.ndarray | None:
    return _not_above(int64_of_text(column))


def _rows_of_numbers(column: pa.Array) -> np.ndarray | None:
    return int64_of_numbers(column, 0, MAX_ID)


def _not_above(ids: np.ndarray | None) -> np.ndarray | None:
    return None if ids is not None and len(ids) and (ids.min() < 0 or ids.max() > MAX_ID) else ids


def times_like(text: str) -> Kind:
    """The kind of a column of times of which `text` is the first: whole numbers, or dates with or without a time of day. Where it
    is neither, whole numbers are taken, and `text` is told for what it is.
    """
    if DATE.match(text):
        return CLOCK_TIME
    return WHOLE_TIME if not text or DIGITS_ONLY.fullmatch(text_of(text)) else UNTOLD_TIME


def _whole_problem(value: object) -> Said:
    return _time_problem(value, "is no time: the first row has a whole number, so all must")


def _untold_problem(value: object) -> Said:
    if _is_clock(text_of(value)):
        return _time_problem(value, "is no time: the first row has no date, so all must have whole numbers")
    return _time_problem(value, "is neither a whole number nor an ISO 8601 date such as 2024-04-05T21:01")


def _time_problem(value: object, said: str) -> Said:
    text = text_of(value)
    if text and not DIGITS_ONLY.fullmatch(text):
        return "no time", f"{short(text)!r} {said}"
    return int64_problem(value, "use a coarser unit of time")


def _whole_times_of_text(column: pa.Array) -> np.ndarray | None:
    return _with_none_beyond(int64_of_text(column))


def _whole_times_of_numbers(column: pa.Array) -> np.ndarray | None:
    return _with_none_beyond(int64_of_numbers(column))


def _whole_times(values: Sequence[object]) -> np.ndarray:
    whole_ones = _integers(values)
    return np.stack([whole_ones, np.zeros_like(whole_ones)])


def _with_none_beyond(times: np.ndarray | None) -> np.ndarray | None:
    return None if times is None else np.stack([times, np.zeros_like(times)])


def _clock_times_of_text(column: pa.Array) -> np.ndarray | None:
    if not len(column):
        return np.empty((2, 0), np.int64)
    found = _cast_times(column, ZONED.search(column[:1].view(pa.binary())[0].as_py().decode("utf-8", "replace")) is not None)
    if found is None:
        # pyarrow takes long to find that many are wrong, so that this is asked first.
        try:
            if not _match(column, CLOCKS).all():
                return None
            zoned = _match(column, ZONED.pattern)
        except pa.ArrowInvalid:  # no UTF-8
            return None
        found = np.empty((2, len(column)), np.int64)
        for zone in (True, False):
            some = _cast_times(column.filter(pa.array(zoned == zone)), zone)
            if some is None:
                return None
            found[:, zoned == zone] = some
    return None if found[0].min() < YEAR_ONE else found  # pyarrow knows a year 0


def _match(column: pa.Array, pattern: str) -> np.ndarray:
    options = compute.MatchSubstringOptions(pattern)
    return compute.call_function("match_substring_regex", [column], options).to_numpy(zero_copy_only=False)


def _cast_times(column: pa.Array, zoned: bool) -> np.ndarray | None:
    """Times of texts that all have a zone, or none of which has one: pyarrow does not take both."""
    for unit in ("us", "ns"):  # the coarser one has all years
        try:
            return clock_numbers(compute.cast(column, pa.timestamp(unit, "UTC" if zoned else None)))[0]
        except pa.ArrowInvalid:
            continue
    return None


def _clock_times_of_dates(column: pa.Array) -> np.ndarray | None:
    if not is_clock(column.type):
        return None
    numbers, absent = clock_numbers(column)
    return None if absent.any() else numbers


def is_clock(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def clock_numbers(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Of a column of timestamps or dates: int64 `[2, n]`, and bool `[n]` which have none, since they are missing or centuries of
    millennia away.
    """
    unit = "D" if pa.types.is_date32(column.type) else "ms" if pa.types.is_date64(column.type) else column.type.unit
    raw = column.cast(pa.int32()).cast(pa.int64()) if unit == "D" else column.cast(pa.int64())
    units = compute.fill_null(raw, 0).to_numpy(zero_copy_only=False)
    absent = column.is_null().to_numpy(zero_copy_only=False)
    if unit == "ns":
        return np.stack([units // NANOSECONDS, units % NANOSECONDS]), absent
    scale = {"D": 86_400_000_000, "s": 1_000_000, "ms": 1000, "us": 1}[unit]
    beyond = (units > MAX_USER // scale) | (units < -(MAX_USER // scale))
    return np.stack([np.where(beyond, 0, units) * scale, np.zeros_like(units)]), absent | beyond


def _is_clock(text: str) -> bool:
    try:
        _clock_time(text)
    except (ValueError, OverflowError):
        return False
    return True


def _clock_problem(value: object) -> Said:
    text = text_of(value)
    if not text:
        return int64_problem(value, "")
    if _is_clock(text):
        return None
    example = "such as 2024-05-31 or 2024-05-31T18:30:00.25Z"
    if DATE.match(text):
        return "no time", f"{short(text)!r} is no time: it looks like an ISO 8601 date, {example}, but is none"
    return "no time", f"{short(text)!r} is no time: the first row has a date, so all must, {example}"


def _clock_time(value: object) -> tuple[int, int]:
    """Microseconds since 1970, and nanoseconds beyond; UTC where there is no zone."""
    text = text_of(value)
    found = CLOCK.fullmatch(text)
    if found is None:
        raise ValueError(text)
    *parts, fraction, zone = found.groups()
    moment = datetime(*(int(part or 0) for part in parts), tzinfo=_zone(zone))  # type: ignore[arg-type]
    digits = (fraction or "").ljust(9, "0")
    return (moment - EPOCH) // timedelta(microseconds=1) + int(digits[:6]), int(digits[6:])


def _clock_times(values: Sequence[object]) -> np.ndarray:
    return np.array([_clock_time(value) for value in values], np.int64).reshape(-1, 2).T


def _zone(text: str | None) -> timezone:
    if text in (None, "Z"):
        return timezone.utc
    digits = text[1:].replace(":", "").ljust(4, "0")
    ahead = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return timezone(-ahead if text[0] == "-" else ahead)


ROW = Kind(_rows_of_text, _rows_of_numbers, problem_of, _integers)
USER = Kind(int64_of_text, int64_of_numbers, problem_of_user, _integers)  # of sequences
WHOLE_TIME = Kind(_whole_times_of_text, _whole_times_of_numbers, _whole_problem, _whole_times)
UNTOLD_TIME = Kind(_whole_times_of_text, _whole_times_of_numbers, _untold_problem, _whole_times)
CLOCK_TIME = Kind(_clock_times_of_text, _clock_times_of_dates, _clock_problem, _clock_times, clock=True)
