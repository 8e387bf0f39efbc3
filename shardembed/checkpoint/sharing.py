"""Who saves what: pure, and the same on all ranks, so that nothing is said about it.

A region that one rank has is saved there. One that several have alike is saved once: cut into parts of about a piece, which are
dealt to its ranks from a place that the key's hash picks, so that many small ones and a few large ones both spread.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from shardembed.checkpoint.format.blocks import chunk_name, id_names, update_names
from shardembed.checkpoint.format.pieces import PIECE_BYTES
from shardembed.checkpoint.inventory import Item, Region
from shardembed.checkpoint.living import IdRegion


@dataclass(frozen=True)
class Saved:
    """A part of an item that this rank writes.

    Attributes:
        item: the tensor.
        rows: of the tensor.
        columns: of the tensor.
        data: the values, `[len(rows), len(columns)]`.
        ids: of an increment, the row numbers of what is written, int64; else None.
        listed: of an increment, the places of these rows in `data`, int64; else None.
        living: of a dynamic table, how many ids of these buckets have a row; else None, and `rows` are no buckets. Its `ids` and
            `listed` are given in full checkpoints, too.
        dropped: of a dynamic table and an increment, the ids that have lost their rows, int64, ascending; else None.
    """

    item: Item
    rows: range
    columns: range
    data: torch.Tensor
    ids: torch.Tensor | None = None
    listed: torch.Tensor | None = None
    living: int | None = None
    dropped: torch.Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """What it is called in its file: one name, or those of an increment's row numbers and values; of the ids that are gone."""
        shape = self.item.shape
        if self.item.by_id is not None:
            return id_names(self.item.key, self.rows, self.item.by_id.buckets, self.columns)[: 2 if self.dropped is None else 3]
        if self.ids is None:
            return (chunk_name(self.item.key, shape, self.rows, self.columns),)
        return update_names(self.item.key, self.rows, self.columns, shape[0])

    @property
    def bytes(self) -> int:
        rows = len(self.rows) if self.listed is None else len(self.listed)
        gone = 0 if self.dropped is None else self.dropped.nbytes
        return gone + rows * (len(self.columns) * self.data.element_size() + (0 if self.listed is None else 8))


def parts_of(items: Iterable[Item], rank: int, incremental: bool) -> list[Saved]:
    """What `rank` writes, of the items it holds. `incremental`: of regions that know their touched rows, those alone."""
    parts: list[Saved] = []
    for item in items:
        parts += [saved for region in item.regions for saved in _parts(item, region, rank, incremental)]
        parts += [saved for region in item.living if region.saves for saved in _by_id(item, region, incremental)]
    return parts


def changes(item: Item) -> bool:
    """Whether an increment holds but what changed of it; of a dynamic table's candidates, which are small, it holds all."""
    return item.living[0].members.are_rows if item.living else True


def _by_id(item: Item, region: IdRegion, incremental: bool) -> Iterator[Saved]:
    """Also where a shard has nobody: an update says that this was looked at."""
    members = region.members
    for buckets in region.blocks:
        living = members.of(buckets)
        if not incremental or not members.are_rows:
            yield Saved(item, buckets, region.columns, region.tensor(), living.ids, living.places, len(living.ids))
            continue
        changed = members.changed(buckets)
        gone = members.dropped(buckets) if item.kind == "table" and region.columns.start == 0 else None
        yield Saved(item, buckets, region.columns, region.tensor(), changed.ids, changed.places, len(living.ids), gone)


def _parts(item: Item, region: Region, rank: int, incremental: bool) -> Iterator[Saved]:
    for rows in _share(item.key, region, rank):
        data = region.data[rows.start : rows.stop]
        numbers = region.rows[rows.start : rows.stop]
        if not incremental or region.touched is None:
            yield Saved(item, numbers, region.columns, data)
            continue
        listed = torch.nonzero(region.touched[rows.start : rows.stop]).squeeze(1).cpu()  # host sync on a GPU
        if len(listed):
            yield Saved(item, numbers, region.columns, data, numbers.start + listed * numbers.step, listed)


def _share(key: str, region: Region, rank: int) -> Iterator[range]:
    """The rows of a region, counted within it, that `rank` saves."""
    rows, ranks = len(region.rows), region.ranks
    if rank not in ranks or not rows:
        return
    size = rows * region.data.shape[1] * region.data.element_size()
    count = min(len(ranks), -(-size // PIECE_BYTES), rows) if len(ranks) > 1 else 1
    # Not hash(), which differs between processes: all ranks must deal alike.
    first = zlib.crc32(key.encode())
    for number in range(count):
        if ranks[(first + number) % len(ranks)] == rank:
            yield range(rows * number // count, rows * (number + 1) // count)
