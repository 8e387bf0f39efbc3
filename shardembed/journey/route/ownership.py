"""Who owns which row of which table: the plan, turned into sorted tensors that answer for many ids at once.

Each lane (a column strip of a table) gets an interval of positions in its slab, num_embeddings long. In it the rows stand block
by block: contiguous blocks as they are, strided ones with the rows of a residue side by side. One binary search over the block
starts of all lanes then finds every id's owner, whatever kind of sharding its table has. All numbers are int64: tables may have
more than 2^31 rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch

from shardembed.kernels.grouping import compiled
from shardembed.store.slab_spec import SlabSpec
from shardembed.tables.pooling import Pooling
from shardembed.tables.table_config import Feature, TableConfig


def positions_of(ids: torch.Tensor, start: int, stride: int, rows: int) -> torch.Tensor:
    """Where the rows `ids` of a table of so many rows stand among its slab's positions."""
    if stride > 1:
        residue = ids % stride
        base, extra = divmod(rows, stride)
        ids = residue * base + residue.clamp(max=extra) + ids // stride
    return ids + start if start else ids


KEPT = 64  # descriptions of how features are read


@dataclass(frozen=True)
class SlabOwners:
    """The owners of one slab's rows, as `rank` sees them (it is its own owner of what every rank holds).

    starts: first position of every block, ascending, `[blocks]`. owners: the rank that answers. shifts: key = position + shift.
    """

    spec: SlabSpec
    lane_starts: tuple[int, ...]
    starts: torch.Tensor
    owners: torch.Tensor
    shifts: torch.Tensor
    lone_owner: int | None

    def locate(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(owner rank, key in that owner's slab) of each position, both int64 `[E]`."""
        if (kernels := compiled(positions.device)) is not None:
            found = kernels.routing.locate(positions.numpy(), self.starts.numpy(), self.owners.numpy(), self.shifts.numpy())
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])
        blocks = torch.searchsorted(self.starts, positions, right=True) - 1
        return self.owners[blocks], positions + self.shifts[blocks]


@dataclass(frozen=True)
class IdGroup:
    """What is read by id in one slab and pooled alike, a strip of a feature each.

    columns: (feature, strip). places, lanes: the number of each feature among those that are read by id, and of its lane, int64.
    paddings: the padding id of each table; empty where no table has one or nothing is pooled.
    """

    columns: tuple[tuple[int, int], ...]
    pooling: Pooling
    weighted: bool
    places: np.ndarray
    lanes: np.ndarray
    paddings: tuple[int, ...]


@dataclass(frozen=True)
class SlabLookupPlan:
    """How one slab is read.

    by_id: what is read by id. bags: (feature, strip) of what is read by bag. arrays: of that, the feature, and of its lane the
    first position, the stride, the table's rows, and the number that stands for its row 0; int64. lanes: as arrays, of every lane,
    with its table in the place of a feature and rows numbered through all tables.
    """

    by_id: tuple[IdGroup, ...]
    bags: tuple[tuple[int, int], ...]
    arrays: tuple[np.ndarray, ...]
    lanes: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class LookupPlan:
    """How features are read, which does not depend on their ids.

    by_id: the features that are read by id; the others are read by bag. padded: of those the ones with a padding id, and that.
    rows, starts: by feature, its table's rows and where they begin when all are numbered through, int64.
    """

    by_id: tuple[int, ...]
    padded: tuple[tuple[int, int], ...]
    slabs: tuple[SlabLookupPlan, ...]
    rows: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True)
class RoutingTable:
    """All that routing needs to know of the plan. `table_starts[t]` is where table t begins when all rows are numbered
    through.
    """

    tables: tuple[TableConfig, ...]
    packings: tuple[str, ...]
    slabs: tuple[SlabOwners, ...]
    table_starts: tuple[int, ...]
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
        return LookupPlan(
            tuple(i for i, bag in enumerate(by_bag) if not bag),
            tuple((i, table.padding_idx) for i, table in enumerate(tables) if by_bag[i] and table.padding_idx is not None),
            tuple(self._of_slab(slab, features, weighted, by_bag) for slab in self.slabs),
            np.array([table.num_embeddings for table in tables], dtype=np.int64),
            np.array([self.table_starts[feature.table] for feature in features], dtype=np.int64),
        )

    def _by_bag(self, feature: Feature, weighted: bool) -> bool:
        table = self.tables[feature.table]
        return self.packings[feature.table] == "bag" and table.why_by_id(feature.pooling, weighted) is None

    def _of_slab(
        self, slab: SlabOwners, features: Sequence[Feature], weighted: Sequence[bool], by_bag: Sequence[bool]
    ) -> SlabLookupPlan:
        bag_columns: list[tuple[int, int]] = []
        bags: list[tuple[int, ...]] = []
        lanes: list[tuple[int, ...]] = []
        alike: dict[tuple[Pooling, bool, bool], list[tuple[int, int, int]]] = {}
        of_table: dict[int, list[int]] = {}
        for i, feature in enumerate(features):
            of_table.setdefault(feature.table, []).append(i)
        for number, (start, lane) in enumerate(zip(slab.lane_starts, slab.spec.lanes, strict=True)):
            table = self.tables[lane.table]
            lanes.append((lane.table, start, lane.stride, table.num_embeddings, self.table_starts[lane.table]))
            for i in of_table.get(lane.table, ()):
                if by_bag[i]:
                    bag_columns.append((i, lane.strip))
                    bags.append((i, start, lane.stride, table.num_embeddings, 0))
                    continue
                pooling = features[i].pooling
                padded = pooling is not None and table.padding_idx is not None  # unpooled, padding is answered with its row
                alike.setdefault((pooling, weighted[i], padded), []).append((i, lane.strip, number))
        places = {i: place for place, i in enumerate(i for i, bag in enumerate(by_bag) if not bag)}
        groups = tuple(self._group(how, found, features, places) for how, found in alike.items())
        return SlabLookupPlan(groups, tuple(bag_columns), _columns(bags), _columns(lanes))

    def _group(
        self,
        how: tuple[Pooling, bool, bool],
        found: Sequence[tuple[int, int, int]],
        features: Sequence[Feature],
        places: Mapping[int, int],
    ) -> IdGroup:
        pooling, weighted, padded = how
        paddings = [self.tables[features[i].table].padding_idx for i, _, _ in found]
        return IdGroup(
            tuple((i, strip) for i, strip, _ in found),
            pooling,
            weighted,
            np.array([places[i] for i, _, _ in found], dtype=np.int64),
            np.array([lane for _, _, lane in found], dtype=np.int64),
            tuple(padding for padding in paddings if padding is not None) if padded else (),
        )

    @staticmethod
    def of(
        tables: tuple[TableConfig, ...],
        packings: tuple[str, ...],
        specs: Sequence[SlabSpec],
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> RoutingTable:
        rows = [table.num_embeddings for table in tables]
        slabs = tuple(_slab_owners(spec, rows, rank, device) for spec in specs)
        return RoutingTable(tables, packings, slabs, tuple(accumulate(rows, initial=0)), world_size)


def _columns(rows: list[tuple[int, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.array(rows, dtype=np.int64).reshape(-1, 5).T.copy())


def _slab_owners(spec: SlabSpec, table_rows: list[int], rank: int, device: torch.device) -> SlabOwners:
    lane_starts = tuple(accumulate((table_rows[lane.table] for lane in spec.lanes), initial=0))[:-1]
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
    tensors = (torch.tensor(numbers, dtype=torch.int64, device=device) for numbers in (starts, owners, shifts))
    lone = owners[0] if len(set(owners)) == 1 else None
    return SlabOwners(spec, lane_starts, *tensors, lone_owner=lone)
