"""What is known of users and of items beside their ids: the value of each feature, by the number of the user or item.

    of rows       the last value in training counts, since what stands in rows that are held out may tell their answer; of whom
                  training has no row, the last value in these
    of a file     that has a row for each user or item (`data.users`, `data.items`): its last value counts

A value that is missing replaces none. Every rank holds all values: 8 bytes for an id, 4 for a number.

Legend: n users or items, m ids of all lists.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal, TypeVar

import numpy as np

from shardembed.recipes.data.lists import Lists, Values, joined, stretches
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.features_config import FeatureConfig

Column = TypeVar("Column", np.ndarray, Lists)
SideName = Literal["user", "item"]
SIDES: tuple[SideName, ...] = ("user", "item")


@dataclass(frozen=True)
class Side:
    """The features of users, or of items.

    Attributes:
        features: which.
        values: of each, by number: of an id int64 `[n]`, of ids `Lists` of n, of a number float32 `[n]`, raw, NaN where missing.
    """

    features: tuple[FeatureConfig, ...] = ()
    values: tuple[Values, ...] = ()

    def with_room(self, more: int) -> Side:
        """With so many users or items more, of which nothing is known."""
        return Side(self.features, tuple(_padded(one, more) for one in self.values))

    def distinct(self) -> dict[str, int]:
        """How many ids each feature has that is one or a list of them."""
        flat = (
            (one.name, values.values if isinstance(values, Lists) else values)
            for one, values in self._pairs
            if one.kind != "number"
        )
        return {name: len(np.unique(values)) for name, values in flat}

    @property
    def _pairs(self) -> list[tuple[FeatureConfig, Values]]:
        return list(zip(self.features, self.values, strict=True))

    def parts_of_values(self) -> list[np.ndarray]:
        """All arrays of the values: two of a list, one of others."""
        return [part for one in self.values for part in ((one.values, one.lengths) if isinstance(one, Lists) else (one,))]


@dataclass(frozen=True)
class Known:
    """Of both sides.

    Attributes:
        users: the features of users.
        items: those of items.
    """

    users: Side = Side()
    items: Side = Side()

    def with_room(self, more_users: int, more_items: int) -> Known:
        """With so many users and items more, of which nothing is known."""
        return Known(self.users.with_room(more_users), self.items.with_room(more_items))

    def __str__(self) -> str:
        """What the values are known by; empty where there are none."""
        found = [part for side in (self.users, self.items) for part in side.parts_of_values()]
        return f"{reduce(lambda crc, part: zlib.crc32(part.tobytes(), crc), found, 0):08x}" if found else ""


NOTHING_KNOWN = Known()


class Gathering:
    """The values of a side's features, of rows that come in any number of chunks.

    features: of the side. count: n.
    """

    def __init__(self, features: Sequence[FeatureConfig], count: int) -> None:
        self._features = tuple(features)
        self._held = [_Listed(count) if one.kind == "ids" else _Flat(one.kind == "number", count) for one in features]

    def see(self, numbers: np.ndarray, columns: Sequence[Values]) -> None:
        """Rows of users or items with these numbers, int64, and what their columns hold, feature after feature."""
        for one, column in zip(self._held, columns, strict=True):
            one.see(numbers, column)

    def side(self) -> Side:
        """What was seen so far."""
        return Side(self._features, tuple(one.all() for one in self._held))


class _Flat:
    """A value each: an id or a number."""

    def __init__(self, number: bool, count: int) -> None:
        self._values = np.full(count, np.nan, np.float32) if number else np.full(count, MISSING)
        self._missing = np.isnan if number else _is_missing

    def see(self, numbers: np.ndarray, column: Values) -> None:
        assert isinstance(column, np.ndarray)
        there = ~self._missing(column)
        numbers, given = last_of(numbers[there], column[there])
        self._values[numbers] = given

    def all(self) -> np.ndarray:
        return self._values


class _Listed:
    """A list each, of which those that were replaced are dropped from time to time."""

    def __init__(self, count: int) -> None:
        self._parts = [np.empty(0, np.int64)]
        self._starts, self._lengths = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._held = 0

    def see(self, numbers: np.ndarray, column: Values) -> None:
        assert isinstance(column, Lists)
        there = column.lengths > 0
        numbers, given = last_of(numbers[there], column[there])
        self._starts[numbers] = self._held + np.cumsum(given.lengths) - given.lengths
        self._lengths[numbers] = given.lengths
        self._parts.append(given.values)
        self._held += len(given.values)
        if self._held > 2 * int(self._lengths.sum()) + len(self._lengths):
            packed = self.all()
            self._parts, self._held = [packed.values], len(packed.values)
            self._starts = np.cumsum(packed.lengths) - packed.lengths

    def all(self) -> Lists:
        return Lists(np.concatenate(self._parts)[stretches(self._starts, self._lengths)], self._lengths.copy())


def _padded(values: Values, more: int) -> Values:
    if isinstance(values, Lists):
        return joined([values, Lists.empty(more)])
    return np.pad(values, (0, more), constant_values=np.nan if values.dtype == np.float32 else MISSING)


def _is_missing(values: np.ndarray) -> np.ndarray:
    return values == MISSING


def last_of(numbers: np.ndarray, column: Column) -> tuple[np.ndarray, Column]:
    """Of each number the last row: distinct numbers, and their values."""
    distinct, back = np.unique(numbers[::-1], return_index=True)
    return distinct, column[len(numbers) - 1 - back]
