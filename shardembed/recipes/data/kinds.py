"""What a column of interactions holds, ids or times, and how a value of it is read: all of a column at once, or one by one.

Numbers are whole and of at most 64 bits, however they are written: 37, 37.0, a Parquet float or decimal. Dates are two numbers:
microseconds since 1970, which any year of four digits has, and the nanoseconds beyond them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.recipes.data.bad import (
    DIGITS,
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

DIGITS_ONLY = re.compile(r"-?[0-9]+")
DATE = re.compile(r"\d{4}-\d\d-\d\d", flags=re.ASCII)
CLOCK = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,9})0*)?)?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?)?", flags=re.ASCII
)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
NANOSECONDS = 1000  # a microsecond
YEAR_ONE = -62_135_596_800_000_000  # microseconds since 1970
INT64 = "^-?[0-9]{1,19}$"


@dataclass(frozen=True)
class Kind:
    """How the values of a column become int64.

    Attributes:
        fast: all of a column of texts, int64 `[numbers, n]`; None where a value is unusable or might be.
        problem: (kind, sentence) of what is wrong with one value, or None.
        value: the numbers of one without a problem.
        lowest: of the first number.
        highest: of the first number.
        clock: its values are dates.
        text: its values are texts.
    """

    fast: Callable[[pa.Array], np.ndarray | None]
    problem: Callable[[object], tuple[str, str] | None]
    value: Callable[[object], tuple[int, ...]]
    lowest: int = MIN_USER
    highest: int = MAX_USER
    clock: bool = False
    text: bool = False

    @property
    def numbers(self) -> int:
        return 1 + self.clock


def _ids_of_text(column: pa.Array) -> np.ndarray | None:
    found = _digits(column, _are_ids)
    if found is None:
        return None
    ids = compute.cast(found, pa.int64()).to_numpy(zero_copy_only=False)
    return ids[None] if not len(ids) or ids.max() <= MAX_ID else None


def _are_ids(column: pa.Array) -> bool:
    short_enough = compute.call_function("binary_length", [column]).to_numpy(zero_copy_only=False) <= DIGITS
    return bool((short_enough & compute.call_function("ascii_is_decimal", [column]).to_numpy(zero_copy_only=False)).all())


def int64_of_text(column: pa.Array) -> np.ndarray | None:
    found = _digits(column, _are_integers)
    if found is None:
        return None
    try:
        return compute.cast(found, pa.int64()).to_numpy(zero_copy_only=False)[None]
    except pa.ArrowInvalid:  # 19 digits may be too many
        return None


def _are_integers(column: pa.Array) -> bool:
    options = compute.MatchSubstringOptions(INT64)
    return bool(compute.call_function("match_substring_regex", [column], options).to_numpy(zero_copy_only=False).all())


def _digits(column: pa.Array, usable: Callable[[pa.Array], bool]) -> pa.Array | None:
    """The column, or if that helps with the zeros behind points gone; None where it is not `usable`."""
    if usable(column):
        return column
    options = compute.ReplaceSubstringOptions(r"^(-?[0-9]+)\.0*$", r"\1")
    try:
        stripped = compute.call_function("replace_substring_regex", [column], options)
    except pa.ArrowInvalid:  # no UTF-8
        return None
    return stripped if usable(stripped) else None


def times_like(text: str) -> Kind:
    """The kind of a column of times of which `text` is the first: whole numbers, or dates with or without a time of day. Where it
    is neither, whole numbers are taken, and `text` is told for what it is.
    """
    if DATE.match(text):
        return CLOCK_TIME
    return WHOLE_TIME if not text or DIGITS_ONLY.fullmatch(text_of(text)) else UNTOLD_TIME


def _whole_problem(value: object) -> tuple[str, str] | None:
    return _time_problem(value, "is no time: the first row has a whole number, so all must")


def _untold_problem(value: object) -> tuple[str, str] | None:
    if _is_clock(text_of(value)):
        return _time_problem(value, "is no time: the first row has no date, so all must have whole numbers")
    return _time_problem(value, "is neither a whole number nor an ISO 8601 date such as 2024-04-05T21:01")


def _time_problem(value: object, said: str) -> tuple[str, str] | None:
    text = text_of(value)
    if text and not DIGITS_ONLY.fullmatch(text):
        return "no time", f"{short(text)!r} {said}"
    return int64_problem(value, "use a coarser unit of time")


def _clock_times(column: pa.Array) -> np.ndarray | None:
    for unit in ("us", "ns"):  # the coarser one has all years
        for zone in (None, "UTC"):  # pyarrow takes times with a zone, or times without, but not both
            try:
                found = clock_numbers(compute.cast(column, pa.timestamp(unit, zone)))[0]
                return None if len(column) and found[0].min() < YEAR_ONE else found  # pyarrow knows a year 0
            except pa.ArrowInvalid:
                continue
    return None


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


def _clock_problem(value: object) -> tuple[str, str] | None:
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


def _zone(text: str | None) -> timezone:
    if text in (None, "Z"):
        return timezone.utc
    digits = text[1:].replace(":", "").ljust(4, "0")
    ahead = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return timezone(-ahead if text[0] == "-" else ahead)


def _number(value: object) -> tuple[int]:
    return (whole(value),)


ID = Kind(_ids_of_text, problem_of, _number, 0, MAX_ID)
USER = Kind(int64_of_text, problem_of_user, _number)  # of sequences
WHOLE_TIME = Kind(int64_of_text, _whole_problem, _number)
UNTOLD_TIME = Kind(int64_of_text, _untold_problem, _number)
CLOCK_TIME = Kind(_clock_times, _clock_problem, _clock_time, clock=True)
