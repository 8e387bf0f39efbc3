"""Ids of any size by numbers from 0, for all that counts by id: hold-outs, popularity, evaluation. Tables never see these numbers.

All ids of the data are gathered in a pass of their own, and their numbers follow their order, so that every rank has the same ones.
It takes some 24 bytes an id; which of them have rows is for the tables to decide.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from shardembed.errors import DataError
from shardembed.inputs.hash64 import hash64
from shardembed.kernels.idmap import IdMap
from shardembed.recipes.data.source import Chunk, Source, all_chunks

CPU = torch.device("cpu")
NOBODY = -1  # the number of an id that is not among them
OTHER_IDS = "there are other ids in it than when it was first read"


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
        self._ids = np.ascontiguousarray(ids)
        self._map: IdMap | None = None

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        """int64 in the shape of `ids`, `NOBODY` where there is none."""
        if self._map is None:
            self._map = IdMap.on(CPU)
            self._map.insert(torch.arange(len(self._ids)), torch.from_numpy(self._ids))
        keys = _tensor(ids.reshape(-1))
        return self._map.find(keys, torch.from_numpy(self._ids)).numpy().reshape(ids.shape)

    def __getstate__(self) -> dict[str, object]:
        return {"_ids": self._ids, "_map": None}  # worker processes make their own


class Numbered:
    """A source with numbers in the place of ids.

    Attributes:
        source: with the ids.
        ids: behind the numbers.
    """

    def __init__(self, source: Source, ids: Ids) -> None:
        self.source, self.ids = source, ids
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
        return self.source.name

    @property
    def parts(self) -> Sequence[str]:
        return self.source.parts

    def chunks(self, part: int) -> Iterator[Chunk]:
        """As of the source.

        Raises:
            DataError: also where there are other ids than those that were gathered.
        """
        for chunk in self.source.chunks(part):
            users, items = self._users(chunk.users), self._items(chunk.items)
            if len(chunk) and min(users.min(), items.min()) == NOBODY:
                raise DataError(f"{self.parts[part]}: {OTHER_IDS}")
            yield replace(chunk, users=users, items=items)

    def place(self, column: int, value: int) -> str:
        return self.source.place(column, int((self.ids.users, self.ids.items)[column][value]))


class _Gathered:
    """The distinct ids of a column."""

    def __init__(self) -> None:
        self._ids, self._count = np.empty(1 << 10, np.int64), 0
        self._map = IdMap.on(CPU)

    def add(self, ids: np.ndarray) -> None:
        known = self._map.find(_tensor(ids), torch.from_numpy(self._ids[: self._count]))
        new = np.unique(ids[known.numpy() == NOBODY])
        if not len(new):
            return
        first, self._count = self._count, self._count + len(new)
        if self._count > len(self._ids):
            self._ids = np.concatenate([self._ids[:first], np.empty(max(self._count, 2 * first) - first, np.int64)])
        self._ids[first : self._count] = new
        self._map.insert(torch.arange(first, self._count), torch.from_numpy(self._ids[: self._count]))

    def all(self) -> np.ndarray:
        """Ascending."""
        return np.sort(self._ids[: self._count])


def _tensor(ids: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(ids, np.int64, ["C", "W"]))  # torch warns of what may not be written to


def made_up(table: str, count: int, names: Path | None = None) -> np.ndarray:
    """The ids of what a generator makes, which are texts: user-0, user-1, and so on; int64 `[count]`. names: a folder for these."""
    return hash64([f"{table}-{number}" for number in range(count)], names=names)
