"""Holding interactions out while they pass by for the first time: one of each user, or what a split says once all are known.

Legend: n interactions, h of them held out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shardembed.recipes.data.bad import NONE
from shardembed.recipes.data.held import TEST, TRAINING, Held, labels
from shardembed.recipes.data.source import Chunk, concatenate
from shardembed.recipes.data.stream import hash_rows
from shardembed.recipes.split_config import RankingSplitConfig


@dataclass(frozen=True)
class HeldRows:
    """What is held out, row by row.

    Attributes:
        rows: their numbers in the source, int64 `[h]`.
        users: int64 `[h]`.
        items: int64 `[h]`.
        labels: int8 `[h]`, `TEST` or `VALIDATION`.
    """

    rows: np.ndarray
    users: np.ndarray
    items: np.ndarray
    labels: np.ndarray

    def of(self, label: int) -> Held:
        """What is held out for one purpose."""
        mine = self.labels == label
        return Held.of(self.users[mine], self.items[mine])


class OneEach:
    """Holds one of each user out as rows pass by: that with the largest hash."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._best = np.empty(0, np.uint64)
        self._row, self._item = np.empty(0, np.int64), np.empty(0, np.int64)

    def see(self, chunk: Chunk, first: int) -> None:
        """Let the chunk's rows compete with those held so far."""
        size = int(chunk.users.max()) + 1
        self._best, self._row, self._item = (grown(array, size) for array in (self._best, self._row, self._item))
        hashes = hash_rows(self._seed, first, len(chunk))
        before = self._best[chunk.users]
        np.maximum.at(self._best, chunk.users, hashes)
        winners = np.flatnonzero((hashes == self._best[chunk.users]) & (hashes > before))
        users = chunk.users[winners]
        self._row[users], self._item[users] = first + winners, chunk.items[winners]

    def held(self, user_counts: np.ndarray, name: str) -> HeldRows:
        """At the end; user_counts: interactions by user, int64."""
        users = np.flatnonzero(user_counts > 1)  # a user's only interaction stays in training
        return HeldRows(self._row[users], users, self._item[users], np.full(len(users), TEST, np.int8))


class Labelled:
    """Holds out what a split says once all rows are known."""

    def __init__(self, seed: int, split: RankingSplitConfig) -> None:
        self._seed, self._split = seed, split
        self._chunks: list[Chunk] = []

    def see(self, chunk: Chunk, first: int) -> None:
        """Keep what is asked of the chunk's rows at the end."""
        self._chunks.append(replace(chunk, dropped=NONE, features=()))

    def held(self, user_counts: np.ndarray, name: str) -> HeldRows:
        """At the end, once; name: of the source, for messages.

        Raises:
            DataError: as `labels`.
        """
        whole = concatenate(self._chunks)
        self._chunks.clear()
        found = labels(whole.users, _keys(whole, self._seed, self._split), self._split, name)
        rows = np.flatnonzero(found != TRAINING)
        return HeldRows(rows, whole.users[rows], whole.items[rows], found[rows])


def _keys(whole: Chunk, seed: int, split: RankingSplitConfig) -> list[np.ndarray]:
    """By which the interactions of a user are ordered; without times they are in order already."""
    return time_keys(whole) if split.by_time else [hash_rows(seed, 0, len(whole))]


def time_keys(whole: Chunk) -> list[np.ndarray]:
    """The columns of times, int64 `[n]` each, the most important one first; none where the source has no times."""
    return [one for one in (whole.times, whole.nanoseconds) if one is not None]


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """`array` with room for `size` elements, and for as many again when it has to move; zeros behind."""
    if size <= len(array):
        return array
    found = np.zeros(max(size, 2 * len(array)), array.dtype)
    found[: len(array)] = array
    return found
