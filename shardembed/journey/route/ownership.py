"""Who owns which row of which table: the plan, turned into sorted tensors that answer for many ids at once.

Each lane (a column strip of a table) gets an interval of positions in its slab, `cut_rows` long. In it the rows stand block
by block: contiguous blocks as they are, strided ones with the rows of a residue side by side. One binary search over the block
starts of all lanes then finds every id's owner, whatever kind of sharding its table has. All numbers are int64: tables may have
more than 2^31 rows. Of a dynamic table it is the buckets that have positions, and the keys are its ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from shardembed.journey.route.columns import Columns
from shardembed.store.slab_spec import SlabSpec
from shardembed.tables.pooling import Pooling
from shardembed.tables.table_config import Feature, TableConfig
from shardembed.wire.message import Numbers

if TYPE_CHECKING:
    from shardembed.journey.route.on_device import DevicePlan


def positions_of(ids: torch.Tensor, start: int, stride: int, rows: int) -> torch.Tensor:
    """Where the rows `ids` of a table of so many rows stand among its slab's positions."""
    if stride > 1:
        residue = ids % stride
        base, extra = divmod(rows, stride)
        ids = residue * base + residue.clamp(max=extra) + ids // stride
    return ids + start if start else ids


KEPT = 64  # descriptions of how features are read


class LaneNumbers(NamedTuple):
    """What routes the ids of one lane, of which kernels get a column each, int64.

    Attributes:
        what: the table or feature that its ids are of.
        start: first position.
        stride: of the rows of the table.
        rows: of the table; of a dynamic one, its buckets.
        low: what stands for its row 0; 0 for ids of a dynamic table.
        first_block: the number of its first block in the slab.
        blocks: how many it has.
    """

    what: int
    start: int
    stride: int
    rows: int
    low: int
    first_block: int
    blocks: int


@dataclass(frozen=True)
class SlabOwners:
    """The owners of one slab's rows, as `rank` sees them (it is its own owner of what every rank holds).

    Attributes:
        spec: the slab.
        lane_starts: first position of every lane.
        lane_blocks: the number of every lane's first block.
        blocks: of every block the first position, ascending, the rank that answers, and what added to a position gives its key,
            int64 `[3, blocks]`.
        lone_owner: the rank that answers for all of them, if it is one.
    """

    spec: SlabSpec
    lane_starts: tuple[int, ...]
    lane_blocks: tuple[int, ...]
    blocks: torch.Tensor
    lone_owner: int | None

    def locate(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(owner rank, key in that owner's slab) of each position, both int64 `[E]`."""
        starts, owners, shifts = self.blocks
        blocks = torch.searchsorted(starts, positions, right=True) - 1
        return owners[blocks], positions + shifts[blocks]

    @cached_property
    def keys(self) -> np.ndarray:
        """No key, of the dtype in which they travel."""
        return np.empty(0, np.int32 if self.spec.key_dtype == torch.int32 else np.int64)


@dataclass(frozen=True)
class IdGroup:
    """What is read by id in one slab and pooled alike, a strip of a feature each.

    Attributes:
        columns: (feature, strip).
        pooling: of them.
        weighted: whether ids have weights.
        padded: whether the tables have a padding id that bags leave out.
        strips: of each its feature, the number of its lane in the slab, and, where they are padded, its padding id: int64
            `[3, strips]`.
    """

    columns: tuple[tuple[int, int], ...]
    pooling: Pooling
    weighted: bool
    padded: bool
    strips: Numbers

    @cached_property
    def features(self) -> list[int]:
        """The feature of each column."""
        return [feature for feature, _ in self.columns]


@dataclass(frozen=True)
class SlabLookupPlan:
    """How one slab is read. Strips stand in the order of their features, and those of a feature from left to right.

    Attributes:
        by_id: what is read by id.
        bags: (feature, strip) of what is read by bag.
        bag_lanes: `LaneNumbers` of that, each with its feature.
        lanes: `LaneNumbers` of every lane, each with its table, and rows numbered through all tables.
    """

    by_id: tuple[IdGroup, ...]
    bags: tuple[tuple[int, int], ...]
    bag_lanes: Numbers
    lanes: Numbers

    @cached_property
    def pooled(self) -> list[tuple[tuple[int, int], ...]]:
        """(feature, strip) of what is pooled together, in the order in which that is done."""
        of_ids = [group.columns for group in self.by_id if group.pooling is not None]
        return [*of_ids, self.bags] if self.bags else of_ids


@dataclass(frozen=True)
class LookupPlan:
    """How features are read, which does not depend on their ids.

    Attributes:
        by_id: the features that are read by id, int64; the others are read by bag.
        padded: of those the ones with a padding id, and that.
        slabs: how each is read.
        rows: by feature, how many its table has, int64; 0 where any number is an id.
        tables: by feature, its table.
        starts: by feature, where its table's rows begin when all are numbered through, int64.
        pooled: how the outputs of those that pool lie side by side, or None where none does, or their tables differ in dtype.
        on_device: the same as a GPU's kernels take it, by device; made when it is first needed.
    """

    by_id: Numbers
    padded: tuple[tuple[int, int], ...]
    slabs: tuple[SlabLookupPlan, ...]
    rows: Numbers
    tables: tuple[int, ...]
    starts: Numbers
    pooled: Columns | None
    on_device: dict[torch.device, DevicePlan] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class RoutingTable:
    """All that routing needs to know of the plan.

    Attributes:
        tables: of the collection.
        packings: of each table, as it is read here.
        slabs: who owns each slab's rows.
        table_starts: where each table begins when all rows are numbered through, int64; dynamic ones have none.
        dynamic: the tables whose ids are any int64.
        world_size: ranks that share the collection.
    """

    tables: tuple[TableConfig, ...]
    packings: tuple[str, ...]
    slabs: tuple[SlabOwners, ...]
    table_starts: Numbers
    dynamic: tuple[int, ...]
    world_size: int
    _lookup_plans: dict[tuple[int, tuple[bool, ...]], tuple[tuple[Feature, ...], LookupPlan]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def lookup_plan(self, features: tuple[Feature, ...], weighted: tuple[bool, ...]) -> LookupPlan:
        """How these features are read, some of them with weights."""
        # By identity, which modules keep: to hash the features of a large model takes longer than to route a small batch.
        known, found = self._lookup_plans.get((id(features), weighted), (None, None))
        if found is None or known is not features:
            if len(self._lookup_plans) >= KEPT:  # of features that were put together for a single call
                self._lookup_plans.clear()
            found = self._read(features, weighted)
            self._lookup_plans[id(features), weighted] = features, found
        return found

    def _read(self, features: tuple[Feature, ...], weighted: tuple[bool, ...]) -> LookupPlan:
        by_bag = [self._by_bag(feature, weight) for feature, weight in zip(features, weighted, strict=True)]
        tables = [self.tables[feature.table] for feature in features]
        slabs = tuple(self._of_slab(slab, features, weighted, by_bag) for slab in self.slabs)
        return LookupPlan(
            np.array([i for i, bag in enumerate(by_bag) if not bag], dtype=np.int64),
            tuple((i, table.padding_idx) for i, table in enumerate(tables) if by_bag[i] and table.padding_idx is not None),
            slabs,
            np.array([_rows(table) for table in tables], dtype=np.int64),
            tuple(feature.table for feature in features),
            np.array([self.table_starts[feature.table] for feature in features], dtype=np.int64),
            Columns.of(
                features, self.tables, [(slab.spec.width, found.pooled) for slab, found in zip(self.slabs, slabs, strict=True)]
            ),
        )

    def _by_bag(self, feature: Feature, weighted: bool) -> bool:
        table = self.tables[feature.table]
        return self.packings[feature.table] == "bag" and table.why_by_id(feature.pooling, weighted) is None

    def _of_slab(
        self, slab: SlabOwners, features: Sequence[Feature], weighted: Sequence[bool], by_bag: Sequence[bool]
    ) -> SlabLookupPlan:
        bags: list[tuple[int, int, LaneNumbers]] = []
        lanes: list[LaneNumbers] = []
        alike: dict[tuple[Pooling, bool, bool], list[tuple[int, int, int]]] = {}
        of_table: dict[int, list[int]] = {}
        for i, feature in enumerate(features):
            of_table.setdefault(feature.table, []).append(i)
        for number, (start, block, lane) in enumerate(zip(slab.lane_starts, slab.lane_blocks, slab.spec.lanes, strict=True)):
            table = self.tables[lane.table]
            numbers = LaneNumbers(lane.table, start, lane.stride, table.cut_rows, 0, block, len(lane.blocks))
            lanes.append(numbers._replace(low=self.table_starts[lane.table] if table.dynamic is None else 0))
            for i in of_table.get(lane.table, ()):
                if by_bag[i]:
                    bags.append((i, lane.strip, numbers._replace(what=i)))
                    continue
                pooling = features[i].pooling
                padded = pooling is not None and table.padding_idx is not None  # unpooled, padding is answered with its row
                alike.setdefault((pooling, weighted[i], padded), []).append((i, lane.strip, number))
        groups = tuple(self._group(how, sorted(found), features) for how, found in alike.items())
        bags.sort()
        return SlabLookupPlan(groups, tuple(bag[:2] for bag in bags), _columns([bag[2] for bag in bags], 7), _columns(lanes, 7))

    def _group(
        self,
        how: tuple[Pooling, bool, bool],
        found: Sequence[tuple[int, int, int]],
        features: Sequence[Feature],
    ) -> IdGroup:
        pooling, weighted, padded = how
        strips: list[tuple[int, ...]] = []
        for i, _, lane in found:
            padding = self.tables[features[i].table].padding_idx
            strips.append((i, lane, -1 if padding is None or not padded else padding))
        return IdGroup(tuple((i, strip) for i, strip, _ in found), pooling, weighted, padded, _columns(strips, 3))

    @staticmethod
    def of(
        tables: tuple[TableConfig, ...],
        packings: tuple[str, ...],
        specs: Sequence[SlabSpec],
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> RoutingTable:
        cut = [table.cut_rows for table in tables]
        slabs = tuple(_slab_owners(spec, cut, rank, device) for spec in specs)
        starts = np.array([0, *accumulate(map(_rows, tables))], dtype=np.int64)
        dynamic = tuple(number for number, table in enumerate(tables) if table.dynamic is not None)
        return RoutingTable(tables, packings, slabs, starts, dynamic, world_size)


def _rows(table: TableConfig) -> int:
    """How many numbers are set aside for the rows of a table."""
    return table.num_embeddings if table.dynamic is None else 0


def _columns(rows: Sequence[tuple[int, ...]], width: int) -> Numbers:
    return np.array(rows, dtype=np.int64).reshape(-1, width).T.copy()


def _slab_owners(spec: SlabSpec, table_rows: list[int], rank: int, device: torch.device) -> SlabOwners:
    lane_starts = tuple(accumulate((table_rows[lane.table] for lane in spec.lanes), initial=0))[:-1]
    lane_blocks = tuple(accumulate((len(lane.blocks) for lane in spec.lanes), initial=0))[:-1]
    starts: list[int] = []
    owners: list[int] = []
    shifts: list[int] = []
    for lane, position in zip(spec.lanes, lane_starts, strict=True):
        for block in lane.blocks:
            ranks = block.shard.ranks
            starts.append(position)
            owners.append(rank if rank in ranks else ranks[rank % len(ranks)])
            shifts.append(block.first_key - position)
            position += len(block.shard.rows)
    blocks = torch.tensor([starts, owners, shifts], dtype=torch.int64, device=device)
    return SlabOwners(spec, lane_starts, lane_blocks, blocks, lone_owner=owners[0] if len(set(owners)) == 1 else None)
