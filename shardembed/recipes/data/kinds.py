"""What a column of interactions holds, ids or times, and how a value of it is read: all of a column at once, or one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.recipes.data.bad import DIGITS, MAX_ID, MAX_USER, MIN_USER, problem_of, problem_of_user, short

WHOLE = re.compile(r"-?[0-9]{1,18}")
DIGITS_ONLY = re.compile(r"-?[0-9]+")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
CLOCK = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[T ](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,9}))?)?)?\s?(Z|[+-]\d\d(?::?\d\d)?)?)?", flags=re.ASCII
)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Kind:
    """How the texts of a column become int64.

    fast: all of a column `[n]`; None where a value is unusable or might be. problem: (kind, sentence) of what is wrong with one
    value, or None. value: of one without a problem.
    """

    fast: Callable[[pa.Array], np.ndarray | None]
    problem: Callable[[object], tuple[str, str] | None]
    value: Callable[[str], int]
    lowest: int = MIN_USER
    highest: int = MAX_USER


def ids_of_text(column: pa.Array) -> np.ndarray | None:
    """The ids int64 `[n]` of a column of digits; None if one of them is no usable id, or might not be."""
    short_enough = compute.call_function("binary_length", [column]).to_numpy(zero_copy_only=False) <= DIGITS
    digits = compute.call_function("ascii_is_decimal", [column]).to_numpy(zero_copy_only=False)
    if not (short_enough & digits).all():
        return None
    ids = compute.cast(column, pa.int64()).to_numpy(zero_copy_only=False)
    return ids if not len(ids) or ids.max() <= MAX_ID else None


def _users_of_text(column: pa.Array) -> np.ndarray | None:
    options = compute.MatchSubstringOptions("^-?[0-9]{1,19}$")
    if not compute.call_function("match_substring_regex", [column], options).to_numpy(zero_copy_only=False).all():
        return None
    try:
        return compute.cast(column, pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:  # 19 digits may be too many
        return None


def times_like(text: str) -> Kind:
    """The kind of a column of times of which `text` is the first: whole numbers, or dates with or without a time of day. Where it
    is neither, whole numbers are taken, and `text` is told for what it is.
    """
    if DATE.match(text):
        return CLOCK_TIME
    return WHOLE_TIME if not text or DIGITS_ONLY.fullmatch(text) else UNTOLD_TIME


def _whole_times(column: pa.Array) -> np.ndarray | None:
    options = compute.MatchSubstringOptions("^-?[0-9]{1,18}$")
    if not compute.call_function("match_substring_regex", [column], options).to_numpy(zero_copy_only=False).all():
        return None
    return compute.cast(column, pa.int64()).to_numpy(zero_copy_only=False)


def _whole_problem(value: object) -> tuple[str, str] | None:
    text = "" if value is None else str(value)
    if WHOLE.fullmatch(text):
        return None
    return _problem(text, "is no time: the first row has a whole number, so all must, of at most 18 digits")


def _untold_problem(value: object) -> tuple[str, str] | None:
    text = "" if value is None else str(value)
    if WHOLE.fullmatch(text):
        return None
    if DIGITS_ONLY.fullmatch(text) or _clock_problem(text) is None:
        return _problem(text, "is no time: the first row has no date, so all must have whole numbers, of at most 18 digits")
    return _problem(text, "is neither a whole number nor an ISO 8601 date such as 2024-04-05T21:01")


def _clock_times(column: pa.Array) -> np.ndarray | None:
    for zone in (None, "UTC"):  # pyarrow takes times with a zone, or times without, but not both
        try:
            return compute.cast(column, pa.timestamp("us", zone)).cast(pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            continue
    return None


def _clock_problem(value: object) -> tuple[str, str] | None:
    text = "" if value is None else str(value)
    try:
        _clock_time(text)
    except (ValueError, OverflowError):
        return _problem(text, "is no time: the first row has a date, so all must, such as 2024-05-31 or 2024-05-31T18:30:00Z")
    return None


def _clock_time(text: str) -> int:
    """Microseconds since 1970; UTC where there is no zone."""
    found = CLOCK.fullmatch(text)
    if found is None:
        raise ValueError(text)
    *parts, fraction, zone = found.groups()
    moment = datetime(*(int(part or 0) for part in parts), tzinfo=_zone(zone))  # type: ignore[arg-type]
    return (moment - EPOCH) // timedelta(microseconds=1) + int(((fraction or "") + "0" * 6)[:6])


def _zone(text: str | None) -> timezone:
    if text in (None, "Z"):
        return timezone.utc
    digits = text[1:].replace(":", "").ljust(4, "0")
    ahead = timedelta(hours=int(digits[:2]), minutes=int(digits[2:]))
    return timezone(-ahead if text[0] == "-" else ahead)


def _problem(text: str, said: str) -> tuple[str, str]:
    if not text:
        return "missing", "the value is missing; remove the row or fill it in"
    return "no time", f"{short(text)!r} {said}"


ID = Kind(ids_of_text, problem_of, int, 0, MAX_ID)
USER = Kind(_users_of_text, problem_of_user, int)  # of sequences
WHOLE_TIME = Kind(_whole_times, _whole_problem, int)
UNTOLD_TIME = Kind(_whole_times, _untold_problem, int)
CLOCK_TIME = Kind(_clock_times, _clock_problem, _clock_time)
