"""From clicks as files have them to what a model takes.

integers     log(1 + x), as DLRM's own recipe does; negative ones count as 0, and so do missing ones
categories   rows of their tables: hashed or looked up, see `data.ids`; missing ones have row 0. Tables that take any id get them as
             they are, and the lowest integer for missing ones
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from shardembed.inputs.hashing import Hashing
from shardembed.inputs.vocab import Counts, Vocabulary
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.criteo.clicks import ClickData
from shardembed.recipes.data.criteo.rows import MISSING, Clicks
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.stream import rank_slice

MISSING_ROW = 0


@dataclass(frozen=True)
class ClickBatch(Part):
    """A rank's part of a global batch.

    Attributes:
        labels: 0 or 1, float32 `[b]`.
        dense: float32 `[b, I]`.
        rows: of the tables, int64 `[C, b]`, a line for each of the `categories`: one tensor, which comes from a worker and goes to
            a device at once.
        categories: their names.
    """

    labels: torch.Tensor
    dense: torch.Tensor
    rows: torch.Tensor
    categories: tuple[str, ...]

    @property
    def ids(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.categories, self.rows, strict=True))

    def __len__(self) -> int:
        return len(self.labels)


def _as_they_are(values: np.ndarray) -> np.ndarray:
    return values


@dataclass(frozen=True)
class Encoder:
    """What makes batches of clicks.

    Attributes:
        categories: their names.
        lookups: of each category, from values to rows.
        sizes: the rows of each table; 1 where they are not numbered.
        missing: the row, or the id, of what is missing.
    """

    categories: tuple[str, ...]
    lookups: tuple[Callable[[np.ndarray], np.ndarray], ...]
    sizes: tuple[int, ...]
    missing: int = MISSING_ROW

    @staticmethod
    def of(config: CtrDataConfig, data: ClickData) -> Encoder:
        ids = config.ids
        if ids.kind == "dynamic":
            count = len(config.categories)
            return Encoder(config.categories, (_as_they_are,) * count, (1,) * count, missing=MISSING)
        if ids.kind == "vocabulary":
            lookups: tuple[Hashing | Vocabulary, ...] = data.vocabularies
        else:
            sizes = [ids.tables.get(name, ids.num_embeddings) for name in config.categories]
            lookups = tuple(Hashing(size, ids.seed, reserved=1) for size in sizes)
        return Encoder(config.categories, lookups, tuple(lookup.num_embeddings for lookup in lookups))

    def counts(self, stream: Iterable[Clicks]) -> list[np.ndarray]:
        """How often each row of each table is looked up: int64 `[rows]` a category; of rows that have no number in any order."""
        if self.missing == MISSING:
            return self._counts_of_ids(stream)
        found = [np.zeros(size, np.int64) for size in self.sizes]
        for clicks in stream:
            for place, counts in enumerate(found):
                counts += np.bincount(self._rows(clicks, place), minlength=len(counts))
        return found

    def _counts_of_ids(self, stream: Iterable[Clicks]) -> list[np.ndarray]:
        found = [Counts() for _ in self.categories]
        for clicks in stream:
            for place, counts in enumerate(found):
                counts.add(np.ascontiguousarray(clicks.categories[:, place]))
        return [counts.of_integers() for counts in found]

    def _rows(self, clicks: Clicks, place: int) -> np.ndarray:
        column = np.ascontiguousarray(clicks.categories[:, place])
        return np.where(column == MISSING, self.missing, self.lookups[place](column))

    def __call__(self, clicks: Clicks, global_size: int) -> ClickBatch:
        dense = np.log1p(np.maximum(np.nan_to_num(clicks.integers), 0))
        rows = np.stack([self._rows(clicks, place) for place in range(len(self.categories))])
        labels, dense, rows = (torch.from_numpy(one) for one in (clicks.labels.astype(np.float32), dense, rows))
        return ClickBatch(labels, dense, rows, self.categories, global_size=global_size)

    def part(self, clicks: Clicks, rank: int, world_size: int) -> ClickBatch:
        """Of a global batch, what `rank` takes."""
        return self(rank_slice(clicks, rank, world_size), len(clicks))
