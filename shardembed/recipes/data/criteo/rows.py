"""Clicks as they stand in a file.

Legend: n rows, I integer columns, C categories.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from shardembed.inputs.names import Names
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.bad import NONE, Dropped

MISSING = np.iinfo(np.int64).min  # a category that is not there


@dataclass(frozen=True)
class Schema:
    """The columns of a file, in the order that text files have them.

    Attributes:
        label: the name of the column with clicks.
        integers: names of the columns of numbers.
        categories: names of the columns of categories.
        any_id: categories are any integers of 64 bits or texts, which get the ids of `se.hash64`; else integers or hexadecimal.
        books: by category, what keeps texts with their ids.
    """

    label: str
    integers: tuple[str, ...]
    categories: tuple[str, ...]
    any_id: bool = False
    books: Mapping[str, Names] = field(default_factory=dict, compare=False)

    @staticmethod
    def of(config: CtrDataConfig) -> Schema:
        return Schema(config.label, config.integers, config.categories, config.ids.kind == "dynamic")

    @property
    def names(self) -> tuple[str, ...]:
        return (self.label, *self.integers, *self.categories)

    def __str__(self) -> str:
        return f"{len(self.names)}: the label, {len(self.integers)} integers and {len(self.categories)} categories"


@dataclass(frozen=True)
class Clicks:
    """Consecutive rows.

    Attributes:
        labels: 0 or 1, int8 `[n]`.
        integers: float32 `[n, I]`, NaN where missing.
        categories: int64 `[n, C]`, MISSING where missing.
        dropped: rows among them that the source left out; parts and rows put together know of none.
    """

    labels: np.ndarray
    integers: np.ndarray
    categories: np.ndarray
    dropped: Dropped = NONE

    def __len__(self) -> int:
        return len(self.labels)

    def columns(self) -> list[np.ndarray]:
        return [self.labels, self.integers, self.categories]

    def __getitem__(self, rows: slice | np.ndarray) -> Clicks:
        return Clicks(self.labels[rows], self.integers[rows], self.categories[rows])


def concatenate(chunks: list[Clicks]) -> Clicks:
    """At least one chunk."""
    if len(chunks) == 1:
        return chunks[0]
    return Clicks(
        np.concatenate([chunk.labels for chunk in chunks]),
        np.concatenate([chunk.integers for chunk in chunks]),
        np.concatenate([chunk.categories for chunk in chunks]),
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
