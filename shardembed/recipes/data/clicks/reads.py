"""Clicks from files: with a header, of which `data.features` names the columns, or of the Criteo layout.

Legend: n rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shardembed.inputs.names import Names
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.data.wanted import NO_BOOKS, Read, Wanted, wanted_of

if TYPE_CHECKING:
    from shardembed.recipes.data.opened import Files  # pyarrow is asked for only where there are files


def wanted(config: CtrDataConfig, labelled: bool = True, books: Mapping[str, Names] = NO_BOOKS) -> tuple[Wanted, ...]:
    """What to read of files for rows of clicks; books: by column, what keeps texts with their ids.

    Args:
        labelled: also the label and the time, without which rows can only be scored.
    """
    if not config.features:
        return Schema.of(config).wanted(labelled, books)
    features = wanted_of(config.features, config.texts, books)
    if not labelled:
        return features
    times = [Wanted(config.time, "time", "data.time")] if config.time else []
    return (Wanted(config.label, "label", "data.label"), *times, *features)


def clicks_of(read: Read, columns: tuple[Wanted, ...]) -> Clicks:
    """The rows that were read as `columns`. Without a label among them, labels are 0."""
    by_kind: dict[str, list] = {}
    for column, values in zip(columns, read.columns, strict=True):
        by_kind.setdefault("id" if column.kind == "hex" else column.kind, []).append(values)
    count = len(read.columns[0])
    lists: list[Lists] = by_kind.get("ids", [])
    labels = by_kind.get("label", [np.zeros(count, np.int8)])[0]
    # The nanoseconds beyond do not matter for a split.
    times = by_kind["time"][0][0] if "time" in by_kind else None
    numbers, ids = (_stacked(by_kind.get(kind, []), count, dtype) for kind, dtype in (("number", np.float32), ("id", np.int64)))
    return Clicks(labels, numbers, ids, tuple(lists), times, read.dropped)


@dataclass(frozen=True)
class ReadClicks:
    """A source of clicks.

    Attributes:
        files: that are read.
        columns: what was wanted of them.
    """

    files: Files
    columns: tuple[Wanted, ...]

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def parts(self) -> Sequence[str]:
        return self.files.parts

    def chunks(self, part: int) -> Iterator[Clicks]:
        return (clicks_of(read, self.columns) for read in self.files.chunks(part))


def _stacked(columns: list[np.ndarray], count: int, dtype: type) -> np.ndarray:
    """`[n, columns]`, each row in one piece."""
    found = np.empty((count, len(columns)), dtype)
    for place, column in enumerate(columns):
        found[:, place] = column
    return found
