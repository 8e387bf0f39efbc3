"""Who owns which row of which table: the plan, turned into sorted tensors that answer for many ids at once.

Each lane (a column strip of a table) gets an interval of positions in its slab, num_embeddings long. In it the rows stand block
by block: contiguous blocks as they are, strided ones with the rows of a residue side by side. One binary search over the block
starts of all lanes then finds every id's owner, whatever kind of sharding its table has. All numbers are int64: tables may have
more than 2^31 rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from shardembed.kernels.grouping import compiled
from shardembed.slabs import SlabSpec
from shardembed.tables import TableConfig


@dataclass(frozen=True)
class SlabAtlas:
    """The owners of one slab's rows, as `rank` sees them (it is its own owner of what every rank holds).

    starts: first position of every block, ascending, `[blocks]`. owners: the rank that answers. shifts: key = position + shift.
    """

    spec: SlabSpec
    lane_starts: tuple[int, ...]
    starts: torch.Tensor
    owners: torch.Tensor
    shifts: torch.Tensor
    lone_owner: int | None

    def positions(self, number: int, ids: torch.Tensor, num_embeddings: int) -> torch.Tensor:
        """Where the rows `ids` of lane `number`'s table stand among the slab's positions."""
        start, stride = self.lane_starts[number], self.spec.lanes[number].stride
        if stride > 1:
            residue = ids % stride
            base, extra = divmod(num_embeddings, stride)
            ids = residue * base + residue.clamp(max=extra) + ids // stride
        return ids + start if start else ids

    def locate(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(owner rank, key in that owner's slab) of each position, both int64 `[E]`."""
        if (kernels := compiled(positions.device)) is not None:
            found = kernels.routing.locate(positions.numpy(), self.starts.numpy(), self.owners.numpy(), self.shifts.numpy())
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])
        blocks = torch.searchsorted(self.starts, positions, right=True) - 1
        return self.owners[blocks], positions + self.shifts[blocks]


@dataclass(frozen=True)
class Atlas:
    """All that routing needs to know of the plan. `table_starts[t]` is where table t begins when all rows are numbered
    through.
    """

    tables: tuple[TableConfig, ...]
    packings: tuple[str, ...]
    slabs: tuple[SlabAtlas, ...]
    table_starts: tuple[int, ...]
    world_size: int

    @staticmethod
    def of(
        tables: tuple[TableConfig, ...],
        packings: tuple[str, ...],
        specs: Sequence[SlabSpec],
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> Atlas:
        rows = [table.num_embeddings for table in tables]
        slabs = tuple(_slab_atlas(spec, rows, rank, device) for spec in specs)
        return Atlas(tables, packings, slabs, tuple(accumulate(rows, initial=0)), world_size)


def _slab_atlas(spec: SlabSpec, table_rows: list[int], rank: int, device: torch.device) -> SlabAtlas:
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
    return SlabAtlas(spec, lane_starts, *tensors, lone_owner=lone)
