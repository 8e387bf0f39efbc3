"""Rows that cannot be trained on: what is wrong with a value, and the count of rows that were dropped."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal

from shardembed.errors import DataError

MAX_ID = (1 << 32) - 1  # tables and counts have a row for every id up to the largest
MIN_USER, MAX_USER = -1 << 63, (1 << 63) - 1  # of sequences, which have no table of users
DIGITS = 18  # as many fit an int64 whatever they are
FLOATS_END = 1 << 53  # from here on floats leave integers out
WHOLE = re.compile(r"(-?[0-9]+)\.0*")
PLACES_KEPT = 5
SHOWN = 40  # characters of a value in a message
FIELDS = "wrong number of fields"
ENOUGH_DROPPED = 100_000  # rows, to tell that a file is the wrong one before its end


@dataclass(frozen=True)
class Problem:
    """What is wrong with a row.

    Attributes:
        kind: for counting.
        text: a sentence that says where, and what to do.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Dropped:
    """Rows left out.

    Attributes:
        kinds: how many of each kind.
        places: the first few of them, in words.
    """

    kinds: dict[str, int] = field(default_factory=dict)
    places: tuple[str, ...] = ()

    @staticmethod
    def of(problems: list[Problem]) -> Dropped:
        kinds: dict[str, int] = {}
        for problem in problems:
            kinds[problem.kind] = kinds.get(problem.kind, 0) + 1
        return Dropped(kinds, tuple(problem.text for problem in problems[:PLACES_KEPT]))

    def __add__(self, other: Dropped) -> Dropped:
        kinds = {kind: self.kinds.get(kind, 0) + other.kinds.get(kind, 0) for kind in {**self.kinds, **other.kinds}}
        return Dropped(kinds, (self.places + other.places)[:PLACES_KEPT])

    def __len__(self) -> int:
        return sum(self.kinds.values())

    def __str__(self) -> str:
        """The counts in words, the most frequent first."""
        return ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.kinds.items(), key=lambda item: (-item[1], item[0])))


NONE = Dropped()


def refuse_wrong_file(name: str, good: int, dropped: Dropped, what: str) -> None:
    """
    Args:
        name: of the source. good: rows of it that are none of those that were dropped. what: such a row holds.

    Raises:
        DataError: more rows were dropped than are good.
    """
    if len(dropped) > good:
        raise DataError(
            f"{name}: {len(dropped):,} of {good + len(dropped):,} rows read hold no {what} ({dropped}); is this the right file, "
            f"with the right columns? The first: {dropped.places[0]}"
        )


def text_of(value: object) -> str:
    """A value as text: of a whole number its digits, however it is written (37.0 is 37); empty where there is none."""
    if value is None or value != value:  # not a number
        return ""
    if isinstance(value, float | Decimal) and Decimal(value).is_finite() and value == int(value):
        return str(int(value))
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    found = WHOLE.fullmatch(text)
    return found[1] if found else text


def whole(value: object) -> int:
    """The integer that a value without a problem is."""
    return int(text_of(value))


def int64_problem(value: object, said: str) -> tuple[str, str] | None:
    """(kind, sentence) of what is wrong with one value that must be a whole number of 64 bits with a sign; None where nothing is.

    said: what to do about others.
    """
    text = text_of(value)
    if (problem := _no_integer(text, said)) is not None:
        return problem
    if isinstance(value, float) and abs(value) >= FLOATS_END:
        return "too large", f"{short(text)} is a float beyond 2^53, where floats leave integers out; store integers"
    if len(text) > SHOWN or not MIN_USER <= int(text) <= MAX_USER:
        return "too large", f"{short(text)} does not fit 64 bits with a sign; {said}"
    return None


def problem_of(value: object) -> tuple[str, str] | None:
    """(kind, sentence) of what is wrong with one value; None where it is a usable id."""
    text = text_of(value)
    if (problem := _no_integer(text, "number users and items from 0")) is not None:
        return problem
    digits = text.lstrip("-").lstrip("0")
    if text[0] == "-" and digits:
        return "negative", f"{short(text)} is negative; number users and items from 0"
    # Thousands of digits are not turned into a number: that takes long, and Python refuses.
    if len(digits) > DIGITS or int(digits or "0") > MAX_ID:
        return (
            "too large",
            f"{short(text)} is larger than {MAX_ID}; a table has a row for every id up to the largest, so number them from 0",
        )
    return None


def problem_of_user(value: object) -> tuple[str, str] | None:
    """As `problem_of`, for users that have no row anywhere: they are only told apart."""
    return int64_problem(value, "number the users")


def _no_integer(text: str, said: str) -> tuple[str, str] | None:
    if not text:
        return "missing", "the value is missing; remove the row or fill it in"
    if not re.fullmatch(r"-?[0-9]+", text):
        return "not an integer", f"{short(text)!r} is not an integer; {said}"
    return None


def short(text: str) -> str:
    """The beginning of a value, for a message."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
