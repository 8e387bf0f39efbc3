"""From clicks as a source gives them to what a model takes.

numbers   raw, or sign(x) log(1 + |x|); missing ones count as 0. Those of the Criteo layout log(1 + x), as DLRM's own recipe does,
          where negative ones count as 0
buckets   of a number x: row n of a table, where n edges are not above x
ids       rows of their tables: hashed or looked up, see `data.ids`; missing ones have row 0. Tables that take any id get them as
          they are, and the lowest integer for missing ones
lists     likewise, each of their ids

Legend: n rows, b of a rank's part of a batch, I columns of numbers, T tables with an id a row, L with a list, m ids of all lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from shardembed.inputs.hashing import Hashing
from shardembed.inputs.vocab import Counts, Vocabulary
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.feature_values import bucket_of, edges_of, signed_log
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.stream import rank_slice, rank_start
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.features_config import FeatureConfig, names_of_ids

MISSING_ROW = 0
Lookup = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ClickBatch(Part):
    """A rank's part of a global batch.

    Attributes:
        labels: 0 or 1, float32 `[b]`.
        dense: float32 `[b, I]`.
        rows: of the tables with an id a row, int64 `[T, b]`, a line each: one tensor, which comes from a worker and goes to a
            device at once.
        values: what the lists of all tables hold, table after table, int64 `[m]`.
        offsets: where in its table's values each list begins, and the last one ends, int64 `[L, b + 1]`.
        names: of the tables of `rows`.
        lists: names of the tables of `offsets`.
        sizes: how many of `values` each of these has.
        first: the number in the global batch of the first sample.
        drop: what drops elements of what a layer, by its number, gives; None where nothing is dropped.
    """

    labels: torch.Tensor
    dense: torch.Tensor
    rows: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor
    names: tuple[str, ...]
    lists: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    first: int = 0
    drop: Callable[[int, torch.Tensor], torch.Tensor] | None = None

    @property
    def ids(self) -> dict[str, Any]:
        """As tables take them."""
        bags = zip(self.values.split(list(self.sizes)), self.offsets, strict=True) if self.lists else ()
        return {**dict(zip(self.names, self.rows, strict=True)), **dict(zip(self.lists, bags, strict=True))}

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class NumberColumns:
    """What makes of columns of numbers what a model takes as numbers, and not as ids.

    Attributes:
        columns: which of them, and all others make ids.
        logs: whether each one's logarithm is taken.
        least: lower ones count as this.
    """

    columns: tuple[int, ...]
    logs: tuple[bool, ...]
    least: float = -math.inf

    @staticmethod
    def of(config: CtrDataConfig) -> NumberColumns:
        numbers = [one for one in config.columns if one.kind == "number"]
        taken = [(place, one.scale == "log") for place, one in enumerate(numbers) if not one.has_table]
        return NumberColumns(
            tuple(place for place, _ in taken), tuple(log for _, log in taken), -math.inf if config.features else 0.0
        )

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        """float32 `[n, I]` of all columns `[n, all]`."""
        found = np.maximum(np.nan_to_num(numbers[:, self.columns]), np.float32(self.least))
        logs = np.array(self.logs, bool)
        found[:, logs] = signed_log(found[:, logs])
        return found


@dataclass(frozen=True)
class TableColumn:
    """What makes rows of a table of a column.

    Attributes:
        feature: of the settings.
        place: its own among the columns of its kind.
        lookup: from values to rows.
        rows: of the table; 1 where they are not numbered.
        missing: the row, or the id, of an id that is missing.
    """

    feature: FeatureConfig
    place: int
    lookup: Lookup
    rows: int
    missing: int = MISSING_ROW

    def of(self, clicks: Clicks) -> np.ndarray:
        """int64, all of its ids: `[n]`, or as many as its lists hold."""
        if self.feature.kind == "number":
            return self.lookup(clicks.numbers[:, self.place])
        column = clicks.lists[self.place].values if self.feature.kind == "ids" else np.ascontiguousarray(clicks.ids[:, self.place])
        return np.where(column == MISSING, self.missing, self.lookup(column))


@dataclass(frozen=True)
class Encoder:
    """What makes batches of clicks. It follows from the settings and, where there are some, the vocabularies.

    Attributes:
        tables: what makes the ids of each table.
        numbers: what makes numbers.
    """

    tables: tuple[TableColumn, ...]
    numbers: NumberColumns

    @staticmethod
    def of(config: CtrDataConfig, vocabularies: tuple[Vocabulary, ...] = ()) -> Encoder:
        """vocabularies: one for each of `looked_up(config)`, where ids are of kind vocabulary."""
        known = dict(zip(looked_up(config), vocabularies, strict=bool(vocabularies)))
        places: dict[str, int] = {}
        tables = []
        for one in config.columns:
            place = places.get(one.kind, 0)
            places[one.kind] = place + 1
            if one.has_table:
                tables.append(_column(config, one, place, known.get(one.name)))
        return Encoder(tuple(tables), NumberColumns.of(config))

    @staticmethod
    def stored(config: CtrDataConfig, folder: Path) -> Encoder:
        """That of a run, whose vocabularies lie in `folder`.

        Raises:
            DataError: one cannot be read.
        """
        return Encoder.of(config, load_vocabularies(config, folder))

    @property
    def sizes(self) -> dict[str, int]:
        """Rows by table; 1 where they are not numbered."""
        return {table.feature.name: table.rows for table in self.tables}

    @cached_property
    def _single(self) -> tuple[TableColumn, ...]:
        return tuple(table for table in self.tables if table.feature.kind != "ids")

    @cached_property
    def _listed(self) -> tuple[TableColumn, ...]:
        return tuple(table for table in self.tables if table.feature.kind == "ids")

    def counts(self, stream: Iterable[Clicks]) -> list[np.ndarray]:
        """How often each row of each table is looked up: int64 `[rows]` a table; of rows that have no number in any order."""
        numbered = {table.feature.name: np.zeros(table.rows, np.int64) for table in self.tables if table.missing != MISSING}
        others = {table.feature.name: Counts() for table in self.tables if table.missing == MISSING}
        for clicks in stream:
            for table in self.tables:
                name, ids = table.feature.name, table.of(clicks)
                if name in numbered:
                    numbered[name] += np.bincount(ids, minlength=table.rows)
                else:
                    others[name].add(ids)
        found = {**numbered, **{name: counts.of_integers() for name, counts in others.items()}}
        return [found[table.feature.name] for table in self.tables]

    def __call__(self, clicks: Clicks, global_size: int, first: int = 0) -> ClickBatch:
        """first: the number in the global batch of the first of these."""
        rows = np.empty((len(self._single), len(clicks)), np.int64)
        for line, table in zip(rows, self._single, strict=True):
            line[:] = table.of(clicks)
        values = [table.of(clicks) for table in self._listed]
        offsets = np.zeros((len(values), len(clicks) + 1), np.int64)
        for line, table in zip(offsets, self._listed, strict=True):
            np.cumsum(clicks.lists[table.place].lengths, out=line[1:])
        return ClickBatch(
            torch.from_numpy(clicks.labels.astype(np.float32)),
            torch.from_numpy(self.numbers(clicks.numbers)),
            torch.from_numpy(rows),
            torch.from_numpy(np.concatenate(values) if values else np.empty(0, np.int64)),
            torch.from_numpy(offsets),
            tuple(table.feature.name for table in self._single),
            tuple(table.feature.name for table in self._listed),
            tuple(map(len, values)),
            first,
            global_size=global_size,
        )

    def part(self, clicks: Clicks, rank: int, world_size: int) -> ClickBatch:
        """Of a global batch, what `rank` takes."""
        return self(rank_slice(clicks, rank, world_size), len(clicks), rank_start(len(clicks), rank, world_size))


def _column(config: CtrDataConfig, feature: FeatureConfig, place: int, vocabulary: Vocabulary | None) -> TableColumn:
    if feature.buckets is not None:
        edges = edges_of(feature.buckets)
        return TableColumn(feature, place, _Buckets(edges), len(edges) + 1)
    ids = config.ids
    if ids.kind == "dynamic":
        return TableColumn(feature, place, _as_they_are, 1, missing=MISSING)
    if ids.kind == "vocabulary":
        assert vocabulary is not None, "vocabularies are scanned, or loaded"
        return TableColumn(feature, place, vocabulary, vocabulary.num_embeddings)
    size = ids.tables.get(feature.name, ids.num_embeddings)
    return TableColumn(feature, place, Hashing(size, ids.seed, reserved=1), size)


def _as_they_are(values: np.ndarray) -> np.ndarray:
    return values


@dataclass(frozen=True)
class _Buckets:
    edges: np.ndarray

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        return bucket_of(numbers, self.edges)


def looked_up(config: CtrDataConfig) -> tuple[str, ...]:
    """The tables whose ids come from a file's, in the order of their vocabularies."""
    return names_of_ids(config.columns)


def vocabulary_file(folder: Path, table: str) -> Path:
    """Where in `folder` the vocabulary of a table is."""
    return folder / f"{quote(table, safe='')}.txt"


def load_vocabularies(config: CtrDataConfig, folder: Path) -> tuple[Vocabulary, ...]:
    """Those of a run, for `Encoder.of`; none where its ids are of another kind.

    Raises:
        DataError: one cannot be read.
    """
    if config.ids.kind != "vocabulary":
        return ()
    return tuple(Vocabulary.load(vocabulary_file(folder, name)) for name in looked_up(config))
