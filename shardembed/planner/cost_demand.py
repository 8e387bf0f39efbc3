"""What one rank's batch asks of shards, and the bytes of it: the planner's mirror of
`journey.route.segments`, `journey.messages` and `wire.message`.

Legend: N ids, E entries (keys sent), S segments (vectors sent back), B bags, L ids a bag, p an owner's share of the ids, n owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.kernels.cpu import lacking
from shardembed.planner.traffic import Asked, Traffic
from shardembed.planner.workload import TableLoad
from shardembed.tables.layout import Strip
from shardembed.tables.placement import Packing
from shardembed.tables.pooling import Pooling
from shardembed.wire.message import ALIGNMENT
from shardembed.wire.narrow import SCALE_BYTES

Array = NDArray[np.float64]
INT32_MAX = 2**31 - 1
LENGTH_BYTES = 4  # int32, as `journey.messages` sends lengths and multiplicities
ID_BYTES = 8  # int64, off the wire
SLOT_BYTES = 32  # of a row that comes and goes, in each strip: its place in the map, its id, count and last step


@dataclass(frozen=True, eq=False)
class Holdings:
    """What the owners of a strip hold of its rows. A segment is asked of an owner and not of a block: where a rank has several
    blocks or residues of a strip, the ids of a bag that lie in any of them are one segment.

    Attributes:
        ranks: the owners, `[n]`.
        rows: of each, `[n]`.
        asked: of each.
    """

    ranks: NDArray[np.intp]
    rows: Array
    asked: Asked

    @staticmethod
    def of(strip: Strip, asked: Asked, bucket_rows: float = 1) -> Holdings:
        """asked: of each block, in their order. It is passed on as it is where every block has an owner of its own. bucket_rows: of
        what is cut (`Table.bucket_rows`).
        """
        blocks = np.array([block.ranks[0] for block in strip.blocks], np.intp)
        rows = np.array([float(len(block.rows)) for block in strip.blocks]) * bucket_rows
        ranks, owners = np.unique(blocks, return_inverse=True)
        if len(ranks) == len(blocks):
            return Holdings(blocks, rows, asked)
        sums = np.zeros((4, len(ranks)))
        np.add.at(sums.T, owners, np.stack([rows, asked.ids, asked.distinct, asked.touched], 1))
        return Holdings(ranks, sums[0], Asked(*sums[1:]))


@dataclass(frozen=True, eq=False)
class Demand:
    """What is asked of the owners of a strip, each array `[n]`.

    Attributes:
        singles: entries that are read by id, each a segment.
        bagged: entries that are read by bag.
        sums: segments that these make, a bag and owner each.
        touched: distinct rows, by all ranks together.
    """

    singles: Array
    bagged: Array
    sums: Array
    touched: Array

    @property
    def entries(self) -> Array:
        return self.singles + self.bagged

    @property
    def segments(self) -> Array:
        return self.singles + self.sums

    @property
    def lengths(self) -> Array:
        """Lengths that travel: those of all segments, where some segment has several keys."""
        return np.where(self.bagged > self.sums * (1 + 1e-9), self.segments, 0.0)


@dataclass(frozen=True, eq=False)
class Table:
    """A table of the workload and its expected traffic.

    Attributes:
        load: the table as the workload has it.
        traffic: what batches ask of it.
        batch: samples of a rank.
        ranks: how many ask.
        wire: bytes of a number of a vector on the wire.
    """

    load: TableLoad
    traffic: Traffic
    batch: float
    ranks: int
    wire: int

    @staticmethod
    def together(tables: Sequence[Table]) -> Table:
        """Tables that differ in rows and traffic alone, as one whose rows and traffic are arrays `[n]`; its rows cannot be cut."""
        first, traffics = tables[0], [table.traffic for table in tables]
        rows, ids, distinct, touched = np.array([(each.rows, each.ids, each.distinct, each.touched) for each in traffics]).T
        bags, lengths = (tuple(np.array([getattr(each, name) for each in traffics]).T) for name in ("bags", "lengths"))
        traffic: Any = Traffic(rows, ids, distinct, touched, bags, lengths, first.traffic.place)  # pyright: ignore[reportArgumentType]
        return replace(first, traffic=traffic)

    @cached_property
    def itemsize(self) -> int:
        return self.load.table.dtype.itemsize

    @cached_property
    def compute(self) -> int:
        """Itemsize of sums, gradients and optimizer state."""
        return 8 if self.load.table.dtype == torch.float64 else 4

    @property
    def scale(self) -> int:
        """Bytes that a vector has on the wire beside its elements."""
        return SCALE_BYTES if self.wire == torch.int8.itemsize else 0

    @property
    def rows(self) -> int:
        return self.traffic.rows

    @property
    def cut_rows(self) -> int:
        """What layouts cut: rows, or the buckets into which ids fall."""
        return self.load.table.cut_rows

    @property
    def bucket_rows(self) -> float:
        """Rows that each of them has room for, all of which are counted; a mean where somebody knows how many there will be."""
        return self.load.table.bucket_rows if self.load.ids is None else self.load.ids / self.cut_rows

    @property
    def held_rows(self) -> float:
        """Rows that there is room for."""
        return self.cut_rows * self.bucket_rows

    def asked_of(self, blocks: Sequence[range]) -> Asked:
        """What is asked of blocks of `cut_rows`, each contiguous or one residue of a stride. Buckets are filled by a mix of the
        ids, so some of them are asked for as much as that share of all rows would be.
        """
        if self.load.table.dynamic is None:
            return self.traffic.blocks(blocks)
        cut, rows = self.cut_rows, self.rows
        alike = (
            range(block.start, rows, block.step) if block.step > 1 else range(block.start * rows // cut, block.stop * rows // cut)
            for block in blocks
        )
        asked = self.traffic.blocks(tuple(alike))
        # Residues of a few buckets differ in size more than those of all rows do.
        weight = np.array([len(block) * block.step / cut if block.step > 1 else 1.0 for block in blocks])
        return Asked(*(weight * each for each in (asked.ids, asked.distinct, asked.touched)))

    @property
    def width(self) -> int:
        return self.load.table.embedding_dim

    @property
    def learns(self) -> bool:
        return not self.load.table.frozen

    @cached_property
    def kind(self) -> tuple[object, ...]:
        """What tables have in common that share a slab while they are cut alike."""
        config = self.load.table
        return config.embedding_dim, config.dtype, self.load.optimizer, config.policy, config.name if config.dynamic else None

    def slab(self, width: int, copied: bool, split: bool) -> str:
        """A name for the slab of a strip of so many columns. split: with a statistic of rows whose columns are cut."""
        config = self.load.table
        kind = (config.dtype, self.load.optimizer.describe(), config.policy, copied, split)
        own = () if config.dynamic is None else (config.name,)
        return f"{width} columns, " + ", ".join(map(str, kind + own))

    @cached_property
    def poolings(self) -> tuple[Pooling, ...]:
        return self.load.table.poolings

    @cached_property
    def whole_rows(self) -> bool:
        """The optimizer or max_norm needs a statistic of the whole row."""
        return self.load.optimizer.rowwise or self.load.table.max_norm is not None

    @property
    def twins(self) -> bool:
        """Owners of strips of a row swap its statistic in the update, where columns are cut."""
        return self.load.optimizer.rowwise and self.learns

    @property
    def whole(self) -> Asked:
        """What a rank asks of all rows."""
        return Asked(*(np.array([number]) for number in (self.traffic.ids, self.traffic.distinct, self.traffic.touched)))

    @property
    def own_packing(self) -> Packing:
        """How a rank reads its own copy: by bag, unless the wire would round sums (`journey.setup`)."""
        return "bag" if self.wire == self.itemsize == self.compute else "unique"

    def feature_ids(self, feature: int) -> float:
        return self.traffic.bags[feature] * self.traffic.lengths[feature]

    def read_by_bag(self, packing: Packing | str) -> tuple[bool, ...]:
        """By feature, for input without per-sample weights."""
        return tuple(packing == "bag" and self.load.table.why_by_id(pooling) is None for pooling in self.poolings)

    @cached_property
    def _distinct_by_id(self) -> float:
        """Of the distinct ids, the share that features without a sum have, where the table is packed as bags."""
        kept = tuple(ids for ids, bag in zip(self.load.ids_per_sample, self.read_by_bag("bag"), strict=True) if not bag)
        if not kept:
            return 0.0
        # Distinct ids of some features are no share of all features' by their ids: popular rows occur in each of them.
        alone = Traffic.of(replace(self.load, ids_per_sample=kept), self.batch, self.ranks)
        return alone.distinct / self.traffic.distinct if self.traffic.distinct else 0.0

    def demand(self, asked: Asked, packing: Packing | str) -> Demand:
        """unique: E = S = the distinct ids of all features. bag: E = all ids, S = sum over features of B (1 - (1 - p)^L), the
        expected number of bags with an id on the owner (the ids of a bag drawn independently), and never more than the ids.

        Args:
            asked: of each owner (`Holdings`).
        """
        bags = self.read_by_bag(packing)
        if not any(bags):
            nothing = np.zeros_like(asked.ids)
            return Demand(asked.distinct, nothing, nothing, asked.touched)
        share = asked.ids / np.maximum(self.traffic.ids, 1e-300)
        sums, bagged = np.zeros_like(asked.ids), np.zeros_like(asked.ids)
        for feature, bag in enumerate(bags):
            if bag:
                ids = self.feature_ids(feature) * share
                some = self.traffic.bags[feature] * (1.0 - np.maximum(1.0 - share, 0.0) ** self.traffic.lengths[feature])
                sums, bagged = sums + np.minimum(some, ids), bagged + ids
        singles = asked.distinct * (0.0 if all(bags) else self._distinct_by_id)
        return Demand(singles, bagged, sums, asked.touched)

    def key_bytes(self, demand: Demand, rows: Array) -> Array:
        """Of one rank's request to each owner: keys (int64 of ids, and from 2^31 rows on), lengths, and multiplicities where
        asked for.

        A slab sends int64 keys once its fullest rank has so many rows; here each table is looked at alone.
        """
        wide = (rows > INT32_MAX) | (self.load.table.dynamic is not None)
        key = np.where(wide, 8.0, 4.0) + (LENGTH_BYTES if self.load.table.policy.scale_grad_by_freq else 0)
        return demand.entries * key + demand.lengths * LENGTH_BYTES

    def vector_bytes(self, demand: Demand, widths: Array) -> Array:
        """Of the vectors that one rank gets from each owner; its gradients take as many."""
        return demand.segments * (widths * self.wire + self.scale)

    def swapped_bytes(self, demand: Demand, widths: Array) -> Array:
        """What the owner of a strip sends to those of the others (`store.twins`): one float64 a touched row to each."""
        return (self.width / widths - 1.0) * demand.touched * 8


def padding(item: int) -> float:
    """Expected bytes that fill up a block of items of `item` bytes to a multiple of 16: with g = gcd(16, item), the block ends
    at any multiple of g alike.
    """
    return (ALIGNMENT - gcd(ALIGNMENT, item)) / 2


def updated_bytes(table: Table, widths: Array) -> Array:
    """Bytes that the update of a row moves: weights and state read and written, its gradient read."""
    return widths * (2 * table.itemsize + table.compute) + 2 * state_bytes(table, widths)


def state_bytes(table: Table, widths: Array) -> Array:
    """Bytes of optimizer state of a row."""
    if not table.learns:
        return np.zeros_like(widths)
    shapes = list(table.load.optimizer.state.values())
    return table.compute * (widths * shapes.count("element") + shapes.count("row"))


def slot_bytes(table: Table, widths: Array) -> Array:
    """Bytes that a row takes beside its weights: optimizer state, and what finds and remembers it where ids come and go."""
    return state_bytes(table, widths) + (SLOT_BYTES if table.load.table.dynamic is not None else 0)


def compiled(table: Table) -> bool:
    """Whether a compiled kernel updates the table on a CPU, as `kernels.choose` decides; the tests hold them together."""
    return lacking(table.load.optimizer, table.load.table.dtype) is None


def merged_first(table: Table, width: float) -> bool:
    """Whether gradients are merged before the call that updates a slab of this width, as `store.reductions` does where the
    optimizer needs a statistic of rows whose columns are cut.
    """
    return table.load.optimizer.rowwise and width < table.width
