"""The ids of a checkpoint that come to a dynamic table here: found out before anything is changed, and then seated anew.

Where an id lies follows from the table here and the rank alone, so any plan, number of ranks and capacity loads any other. Where a
bucket has less room than ids, the table's own rule says who stays, as if all had come in one step; a table from which nobody leaves
is then no place for that checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shardembed.checkpoint.filling import Wanted, fill
from shardembed.checkpoint.format.blocks import Update
from shardembed.checkpoint.format.manifest import Source
from shardembed.checkpoint.format.pieces import Files, read_dropped, read_ids
from shardembed.checkpoint.format.regions import common
from shardembed.checkpoint.inventory import Item
from shardembed.checkpoint.living import IdRegion, Members
from shardembed.errors import CheckpointError
from shardembed.kernels.mixing import mixed


class Placed:
    """Ids, ascending, and the place of each: as `filling.Rows`. Notes which ids were met."""

    def __init__(self, ids: torch.Tensor, places: torch.Tensor) -> None:
        self.ids, self.places = ids, places
        self.met = torch.zeros(len(ids), dtype=torch.bool)

    def of_chunk(self, rows: range) -> tuple[range | torch.Tensor, slice | torch.Tensor]:
        raise CheckpointError(f"rows {rows} of a dynamic table have no ids")  # `checks` lets no such entry pass

    def of_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(self.ids):
            return ids[:0], ids[:0]
        numbers = torch.searchsorted(self.ids, ids).clamp_(max=len(self.ids) - 1)
        positions = (self.ids[numbers] == ids).nonzero().squeeze(1)
        numbers = numbers[positions]
        self.met[numbers] = True
        return positions, self.places[numbers]


def check_met(wanted: Wanted, path: Path) -> None:
    """
    Raises:
        CheckpointError: an entry of a dynamic table did not have all of the ids that the table has.
    """
    rows = wanted.rows
    if isinstance(rows, Placed) and not bool(rows.met.all()):
        lost = rows.ids[~rows.met]
        raise CheckpointError(
            f"{path}: {wanted.key!r} lacks {len(lost)} ids that its table has, id {int(lost[0])} is one: {ALTERED}"
        )


ALTERED = "the checkpoint was altered; load an older one with step="


@dataclass
class Arrival:
    """Who comes to be in a census.

    Attributes:
        members: of the census.
        ids: int64, ascending, on the CPU.
        now: time at which they were saved, in steps.
        seed: of the rows that ids begin with.
        left: how many do not come, since their buckets are full.
        places: of each id, once they are seated.
    """

    members: Members
    ids: torch.Tensor
    now: int
    seed: int
    left: int = 0
    places: torch.Tensor | None = None

    @staticmethod
    def nobody(members: Members) -> Arrival:
        return Arrival(members, torch.empty(0, dtype=torch.int64), members.keys.steps, members.keys.seed)

    def seat(self) -> None:
        """Let these ids and nobody else be there; others begin from now on as they did where these come from."""
        self.members.keys.seed = self.seed
        device = self.members.census.ids_S.device
        self.places = self.members.keys.seat(self.members.census, self.ids.to(device)).cpu()
        if self.members.are_rows:
            self.members.slab.drop()

    def wanted(self, item: Item, region: IdRegion, source: Source) -> Wanted:
        """What of an item is to be read for them."""
        assert self.places is not None
        return Wanted(item.key, source, Placed(self.ids, self.places), region.columns, region.tensor())

    def keep_ages(self) -> None:
        """Move the last steps, which were read as they were saved, to the time of the table here: ids stay as old as they were, or
        get younger where it has not had so many steps.
        """
        census, ahead = self.members.census, self.members.keys.steps - self.now
        if ahead and self.places is not None:
            places = self.places.to(census.lasts_S.device)
            census.lasts_S[places] = (census.lasts_S[places] + ahead).clamp_(min=0)


def arrival(region: IdRegion, source: Source, about: Mapping[str, Source], files: Mapping[Path, Files]) -> Arrival:
    """Who of the ids in the checkpoint belongs here.

    Args:
        region: of those among whom they will be.
        source: of an entry that has all of them.
        about: by name ("last", "count"), the sources of what is said of each id.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    assert source.entry.by_id is not None
    members = region.members
    keys, census = members.keys, members.census
    device = census.ids_S.device

    def mine(ids: torch.Tensor) -> torch.Tensor:
        return ids[keys.groups_of(ids.to(device)).cpu() >= 0]

    alike = source.entry.by_id.buckets == members.buckets
    ids = ids_of(source, files, mine, lambda update: not alike or _meets(update, region.blocks))
    found = Arrival(members, ids, source.entry.by_id.now, source.entry.by_id.seed)
    if census.room is not None:
        groups = keys.groups_of(ids.to(device)).cpu()
        if len(ids) and int(torch.bincount(groups).max()) > census.room:
            stay = _staying(found, groups, census.room, about, files)
            found.ids, found.left = ids[stay], len(ids) - int(stay.sum())
    return found


def ids_of(
    source: Source,
    files: Mapping[Path, Files],
    chosen: Callable[[torch.Tensor], torch.Tensor] = lambda ids: ids,
    looked_into: Callable[[Update], bool] = lambda _: True,
) -> torch.Tensor:
    """The ids that have a row in an entry, int64, ascending; of these what `chosen` leaves of some, in updates to be looked into."""
    there = torch.empty(0, dtype=torch.int64)
    for folder, updates in source.layers:
        if folder == source.updates_in and source.below:
            there = there[~torch.isin(there, read_dropped(files[folder], source.entry))]
        first = [update for update in updates if update.columns.start == 0 and looked_into(update)]
        parts = [chosen(ids) for update in first for _, ids in read_ids(files[folder], source.entry, update)]
        there = torch.cat([there, *parts]).unique()
    return there


def _meets(update: Update, blocks: tuple[range, ...]) -> bool:
    return update.buckets is None or any(common(update.buckets, block) is not None for block in blocks)


def _staying(
    found: Arrival, groups: torch.Tensor, room: int, about: Mapping[str, Source], files: Mapping[Path, Files]
) -> torch.Tensor:
    """Which ids keep a place, bool: of each bucket those whom the table's rule would let leave last."""
    ids, policy = found.ids, found.members.census.policy
    said = {name: torch.zeros(len(ids), 1, dtype=torch.int32) for name in ("last", "count")}
    everyone = [(name, source, Placed(ids, torch.arange(len(ids)))) for name, source in about.items()]
    fill([Wanted(source.entry.key, source, rows, range(1), said[name]) for name, source, rows in everyone], files)
    lasts, counts = said["last"].squeeze(1), said["count"].squeeze(1)
    order = (mixed(ids) ^ -(1 << 63)).argsort(descending=True)  # as numbers without a sign
    order = order[lasts[order].argsort(descending=True, stable=True)]
    if policy.by_count or not found.members.are_rows:
        order = order[policy.halved(counts, lasts, found.now)[order].argsort(descending=True, stable=True)]
    order = order[groups[order].argsort(stable=True)]
    ranked = groups[order]
    stay = torch.zeros(len(ids), dtype=torch.bool)
    stay[order] = torch.arange(len(ids)) - torch.searchsorted(ranked, ranked) < room
    return stay
