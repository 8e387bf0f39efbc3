"""The ids of a checkpoint that come to a dynamic table here: found out before anything is changed, and then seated anew.

Where an id lies follows from the table here and the rank alone, so any plan, number of ranks and capacity loads any other. Where a
bucket has less room than ids, the table's own rule says who stays, as if all had come in one step; a table from which nobody leaves
is then no place for that checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shardembed.checkpoint.filling import Wanted, fill, ids_of
from shardembed.checkpoint.format.manifest import Source
from shardembed.checkpoint.format.pieces import Files
from shardembed.checkpoint.inventory import Item
from shardembed.checkpoint.living import IdRegion, Members
from shardembed.checkpoint.selection import Placed
from shardembed.kernels.mixing import mixed
from shardembed.kernels.placing import by_group, signed
from shardembed.store.dynamic.census import MOST


@dataclass
class Arrival:
    """Who comes to be in a census.

    Attributes:
        members: of the census.
        ids: int64, ascending, on the CPU.
        now: time at which they were saved, in steps.
        seed: of the rows that ids begin with.
        blocks: the buckets they fall into, as those of the checkpoint, where it has as many; else None.
        left: how many do not come, since their buckets are full.
        places: of each id, once they are seated.
    """

    members: Members
    ids: torch.Tensor
    now: int
    seed: int
    blocks: tuple[range, ...] | None = None
    left: int = 0
    places: torch.Tensor | None = None

    @staticmethod
    def nobody(members: Members) -> Arrival:
        return Arrival(members, torch.empty(0, dtype=torch.int64), members.keys.steps, members.keys.seed)

    def seat(self) -> None:
        """Let these ids and nobody else be there; others begin from now on as they did where these come from."""
        device = self.members.census.ids_S.device
        self.places = self.members.keys.seat(self.members.census, self.ids.to(device)).cpu()
        if self.members.are_rows:
            self.members.keys.seed = self.seed
            self.members.slab.drop()

    def wanted(self, item: Item, region: IdRegion, source: Source) -> Wanted:
        """What of an item is to be read for them."""
        assert self.places is not None
        return Wanted(item.key, source, Placed(self.ids, self.places, self.blocks), region.columns, region.tensor())

    def keep_ages(self) -> None:
        """Move the last steps, which were read as they were saved, to the time of the table here: ids stay as old as they were, or
        get younger where it has not had so many steps. Whatever a file says, an id that is there was not touched before all steps
        nor after the last, and its count is not negative.
        """
        if self.places is None:
            return
        census, steps = self.members.census, self.members.keys.steps
        places = self.places.to(census.lasts_S.device)
        ahead = min(max(steps - self.now, -MOST), MOST)
        lasts = census.lasts_S[places].to(torch.int64) + ahead
        census.lasts_S[places] = lasts.clamp(min=0, max=min(steps, MOST)).to(torch.int32)
        if census.policy.counts:
            census.counts_S[places] = census.counts_S[places].clamp(min=0)


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

    blocks = region.blocks if source.entry.by_id.buckets == members.buckets else None
    anyone = Placed(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), blocks)
    ids = ids_of(source, files, mine, lambda update: anyone.may_be_in(update.buckets))
    found = Arrival(members, ids, source.entry.by_id.now, source.entry.by_id.seed, blocks)
    if census.room is not None:
        groups = keys.groups_of(ids.to(device)).cpu()
        if len(ids) and int(torch.bincount(groups).max()) > census.room:
            stay = _staying(found, groups, census.room, about, files)
            found.ids, found.left = ids[stay], len(ids) - int(stay.sum())
    return found


def _staying(
    found: Arrival, groups: torch.Tensor, room: int, about: Mapping[str, Source], files: Mapping[Path, Files]
) -> torch.Tensor:
    """Which ids keep a place, bool: of each bucket those whom the table's rule would let leave last."""
    ids, policy = found.ids, found.members.census.policy
    said = {name: torch.zeros(len(ids), 1, dtype=torch.int32) for name in ("last", "count")}
    everyone = [(name, source, Placed(ids, torch.arange(len(ids)))) for name, source in about.items()]
    fill([Wanted(source.entry.key, source, rows, range(1), said[name]) for name, source, rows in everyone], files)
    lasts, counts = said["last"].squeeze(1).clamp(min=0, max=min(found.now, MOST)), said["count"].squeeze(1).clamp(min=0)
    order = signed(mixed(ids)).argsort(descending=True)
    order = order[lasts[order].argsort(descending=True, stable=True)]
    if policy.by_count or not found.members.are_rows:
        order = order[policy.halved(counts, lasts, found.now)[order].argsort(descending=True, stable=True)]
    order = by_group(order, groups)
    ranked = groups[order]
    stay = torch.zeros(len(ids), dtype=torch.bool)
    stay[order] = torch.arange(len(ids)) - torch.searchsorted(ranked, ranked) < room
    return stay
