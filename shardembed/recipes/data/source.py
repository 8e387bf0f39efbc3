"""What the training job needs to know of where interactions come from: chunks that can be read again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardembed.recipes.data.bad import NONE, Dropped
from shardembed.recipes.data.lists import Lists


@dataclass(frozen=True)
class Chunk:
    """Consecutive interactions.

    Attributes:
        users: ids from 0, int64 `[n]`.
        items: ids from 0, int64 `[n]`.
        dropped: rows among them that a source left out; parts of a chunk and chunks put together do not know of any.
        times: int64 `[n]`, where they were asked for.
        nanoseconds: int64 `[n]` beyond times that are microseconds, where any is not 0.
        features: the columns of data.features, where the source has them; parts of a chunk and chunks put together have none.
    """

    users: np.ndarray
    items: np.ndarray
    dropped: Dropped = NONE
    times: np.ndarray | None = None
    nanoseconds: np.ndarray | None = None
    features: tuple[np.ndarray | Lists, ...] = ()

    def __len__(self) -> int:
        return len(self.users)

    @property
    def nbytes(self) -> int:
        """Of its columns."""
        return sum(one.nbytes for one in (*self.columns(), *self.features))

    def columns(self) -> list[np.ndarray]:
        """What a fingerprint is of: all but the features."""
        return [self.users, self.items, *(one for one in (self.times, self.nanoseconds) if one is not None)]

    def __getitem__(self, rows: slice | np.ndarray) -> Chunk:
        times, nanoseconds = (None if one is None else one[rows] for one in (self.times, self.nanoseconds))
        return Chunk(self.users[rows], self.items[rows], times=times, nanoseconds=nanoseconds)


EMPTY = Chunk(np.empty(0, np.int64), np.empty(0, np.int64))


def concatenate(chunks: list[Chunk]) -> Chunk:
    """One after the other, of which all have times or none has; of none an empty one."""
    if len(chunks) == 1:
        return chunks[0]
    if not chunks:
        return EMPTY
    times = [c.times for c in chunks if c.times is not None]
    users, items = np.concatenate([c.users for c in chunks]), np.concatenate([c.items for c in chunks])
    fine = [np.zeros(len(c), np.int64) if c.nanoseconds is None else c.nanoseconds for c in chunks]
    some = any(c.nanoseconds is not None for c in chunks)
    return Chunk(users, items, times=np.concatenate(times) if times else None, nanoseconds=np.concatenate(fine) if some else None)


class Source(Protocol):
    """Interactions in an order that is the same each time they are read, in one or more parts."""

    @property
    def name(self) -> str:
        """For messages: a path, or what stands in for one."""
        ...

    @property
    def parts(self) -> Sequence[str]:
        """Their names, for messages: of files the paths."""
        ...

    def chunks(self, part: int) -> Iterator[Chunk]:
        """All interactions of a part from the first on, in chunks of any size."""
        ...

    def place(self, column: int, value: int) -> str:
        """Where the first row with that user (column 0) or item (1) is, for messages."""
        ...


def all_chunks(source: Source) -> Iterator[Chunk]:
    """Those of all parts."""
    return (chunk for part in range(len(source.parts)) for chunk in source.chunks(part))
