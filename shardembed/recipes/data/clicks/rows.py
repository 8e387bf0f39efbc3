"""Clicks as a source gives them.

Legend: n rows, I columns of numbers, C of ids, each in the order of the settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardembed.recipes.data.bad import NONE, Dropped
from shardembed.recipes.data.lists import Lists, joined


@dataclass(frozen=True)
class Clicks:
    """Consecutive rows.

    Attributes:
        labels: 0 or 1, int8 `[n]`.
        numbers: float32 `[n, I]`, NaN where missing.
        ids: int64 `[n, C]`, MISSING where missing.
        lists: a column of lists of ids each.
        times: int64 `[n]`, whole numbers or microseconds since 1970; None where rows have none.
        dropped: rows among them that the source left out; parts and rows put together know of none.
    """

    labels: np.ndarray
    numbers: np.ndarray
    ids: np.ndarray
    lists: tuple[Lists, ...] = ()
    times: np.ndarray | None = None
    dropped: Dropped = NONE

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self) -> list[np.ndarray]:
        """What a fingerprint is of: all, with a hash in the place of each list."""
        times = [] if self.times is None else [self.times]
        return [self.labels, self.numbers, self.ids, *(column.folded() for column in self.lists), *times]

    def __getitem__(self, rows: slice | np.ndarray) -> Clicks:
        times = None if self.times is None else self.times[rows]
        return Clicks(self.labels[rows], self.numbers[rows], self.ids[rows], tuple(column[rows] for column in self.lists), times)


def concatenate(chunks: list[Clicks]) -> Clicks:
    """One after the other, of at least one; all have times or none has."""
    if len(chunks) == 1:
        return chunks[0]
    times = [chunk.times for chunk in chunks if chunk.times is not None]
    return Clicks(
        np.concatenate([chunk.labels for chunk in chunks]),
        np.concatenate([chunk.numbers for chunk in chunks]),
        np.concatenate([chunk.ids for chunk in chunks]),
        tuple(map(joined, zip(*(chunk.lists for chunk in chunks), strict=True))),
        np.concatenate(times) if times else None,
    )


class ClickSource(Protocol):
    """Clicks in an order that is the same each time they are read, in one or more parts that ranks can read side by side."""

    @property
    def name(self) -> str:
        """For messages: a path, or what stands in for one."""
        ...

    @property
    def parts(self) -> Sequence[str]:
        """Their names, for messages: of files the paths."""
        ...

    def chunks(self, part: int) -> Iterator[Clicks]:
        """All rows of a part, in chunks of any size."""
        ...
