"""Ids of any size by numbers from 0, for all that counts by id: hold-outs, popularity, evaluation. Tables never see these numbers.

All ids of the data are gathered in a pass of their own, and their numbers follow their order, so that every rank has the same ones.
It takes 8 bytes an id; which of them have rows is for the tables to decide.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from shardembed.errors import DataError
from shardembed.inputs.hash64 import hash64
from shardembed.recipes.data.source import Chunk, Source, all_chunks

WAITING = 1 << 22  # ids of a column that are held before they are brought together
NOBODY = -1  # the number of an id that is not among them


@dataclass(frozen=True)
class Ids:
    """The ids behind the numbers.

    Attributes:
        users: of each number the id, int64, distinct.
        items: likewise.
    """

    users: np.ndarray
    items: np.ndarray

    def __str__(self) -> str:
        """What they are known by."""
        return f"{zlib.crc32(self.items.tobytes(), zlib.crc32(self.users.tobytes())):08x}"


class Numbers:
    """From ids to their numbers.

    ids: of each number the id, int64, distinct.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """int64 in the shape of `ids`, `NOBODY` where there is none."""
        if not len(self._sorted):
            return np.full(ids.shape, NOBODY, np.int64)
        places = np.minimum(np.searchsorted(self._sorted, ids), len(self._sorted) - 1)
        return np.where(self._sorted[places] == ids, self._order[places], NOBODY)


class Numbered:
    """A source with numbers in the place of ids.

    Attributes:
        ids: behind them.
    """

    def __init__(self, source: Source, ids: Ids) -> None:
        self._source, self.ids = source, ids
        self._users, self._items = Numbers(ids.users), Numbers(ids.items)

    @staticmethod
    def of(source: Source, more_users: Iterable[np.ndarray] = (), more_items: Iterable[np.ndarray] = ()) -> Numbered:
        """Gather the ids of a source, in one pass, and others that have no interactions.

        Raises:
            DataError: it cannot be read.
        """
        users, items = _Gathered(), _Gathered()
        for chunk in all_chunks(source):
            users.add(chunk.users)
            items.add(chunk.items)
        for gathered, more in ((users, more_users), (items, more_items)):
            for ids in more:
                gathered.add(ids)
        return Numbered(source, Ids(users.all(), items.all()))

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def parts(self) -> Sequence[str]:
        return self._source.parts

    def chunks(self, part: int) -> Iterator[Chunk]:
        for chunk in self._source.chunks(part):
            users, items = self._users(chunk.users), self._items(chunk.items)
            if len(chunk) and min(users.min(), items.min()) == NOBODY:
                raise DataError(f"{self.parts[part]}: there are other ids in it than when it was first read")
            yield replace(chunk, users=users, items=items)

    def place(self, column: int, value: int) -> str:
        return self._source.place(column, int((self.ids.users, self.ids.items)[column][value]))


class _Gathered:
    """The distinct ids of a column."""

    def __init__(self) -> None:
        self._parts = [np.empty(0, np.int64)]
        self._waiting = 0

    def add(self, ids: np.ndarray) -> None:
        self._parts.append(np.unique(ids))
        self._waiting += len(self._parts[-1])
        if self._waiting > max(WAITING, len(self._parts[0])):
            self._parts, self._waiting = [self.all()], 0

    def all(self) -> np.ndarray:
        return np.unique(np.concatenate(self._parts))


def made_up(table: str, count: int, names: Path | None = None) -> np.ndarray:
    """The ids of what a generator makes, which are texts: user-0, user-1, and so on; int64 `[count]`. names: a folder for these."""
    return hash64([f"{table}-{number}" for number in range(count)], names=names)
