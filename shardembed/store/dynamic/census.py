"""Which ids have a place on this rank, and where: the map, and of each place its id, its count and when it was touched last.

Legend: E entries, U distinct ids, O newcomers, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardembed.errors import UnsupportedError
from shardembed.kernels.idmap import IdMap
from shardembed.kernels.memory import on_huge_pages
from shardembed.kernels.placing import DEAD, EVICTED, MOST, Rules, by_group, meet, place, ranked
from shardembed.store.dynamic.policy import Policy
from shardembed.store.memory import grown

FREE = -1
FIRST = 1024  # places of a table without a limit, to begin with
SWEEPS = 8  # in the time that a row lives, at most: so many that few are dead, so few that looking for them costs little


@dataclass(frozen=True)
class Settled:
    """What came of newcomers.

    Attributes:
        slots_O: the place of each, -1 where there is none.
        evicted: how many ids left for them.
        expired: how many had died before.
    """

    slots_O: torch.Tensor
    evicted: int
    expired: int


class Census:
    """Ids with a place.

    Args:
        policy: of the table.
        room: places of each bucket, side by side, where there is a limit; None where there is none.
        buckets: that lie on this rank.
        device: of the numbers.

    Attributes:
        ids_S: of each place, int64. lasts_S: the step in which it was touched last, int32, below 0 where it is free.
        counts_S: int32; empty where counts are not kept.
    """

    def __init__(self, policy: Policy, room: int | None, buckets: int, device: torch.device) -> None:
        self.policy, self.room, self._device = policy, room, device
        self._map = IdMap.on(device)
        places = FIRST if room is None else buckets * room
        self.ids_S = on_huge_pages(torch.empty(places, dtype=torch.int64, device=device)).zero_()
        self.lasts_S = on_huge_pages(torch.empty(places, dtype=torch.int32, device=device)).fill_(FREE)
        self.counts_S = on_huge_pages(torch.empty(places if policy.counts else 0, dtype=torch.int32, device=device)).zero_()
        self._top = 0  # places that have ever been given, where there is no limit
        self._left = self.ids_S[:0]  # of these, the ones that are free again
        self._swept = 0  # the step in which the dead were last looked for

    @property
    def places(self) -> int:
        """How many there are; more, where there is no limit, as soon as they are needed."""
        return self.ids_S.shape[0]

    @property
    def nbytes(self) -> int:
        """Memory of all this."""
        return self._map.nbytes + sum(part.nbytes for part in (self.ids_S, self.lasts_S, self.counts_S))

    def find(self, keys_E: torch.Tensor, steps: int) -> torch.Tensor:
        """The place of each id after `steps` steps, -1 where it has none or has died."""
        slots_E = self._map.find(keys_E, self.ids_S)
        return slots_E if self.policy.lives_on else self._of_the_living(slots_E, steps)

    def _of_the_living(self, slots_E: torch.Tensor, steps: int) -> torch.Tensor:
        alive = self.policy.alive(self.lasts_S[slots_E.clamp(min=0)], steps)
        return torch.where(alive, slots_E, -1)

    def living(self, steps: int) -> torch.Tensor:
        """The places of all ids that are there, ascending."""
        return ((self.lasts_S >= 0) & self.policy.alive(self.lasts_S, steps)).nonzero().squeeze(1)

    def lacking(self, groups_O: torch.Tensor, steps: int) -> int:
        """Of so many newcomers of these buckets, how many would find no place after `steps` steps unless somebody living leaves."""
        if self.room is None:
            return 0
        groups_G, wanted_G = groups_O.unique(return_counts=True)
        lasts = self.lasts_S.view(-1, self.room)[groups_G]
        taken_G = ((lasts >= 0) & self.policy.alive(lasts, steps)).sum(1)
        return int((wanted_G - self.room + taken_G).clamp(min=0).sum())

    def meet(self, slots_E: torch.Tensor, now: int, times_E: torch.Tensor | None, times_P: torch.Tensor) -> None:
        """Ids were met; as `placing.meet`."""
        meet(slots_E, times_E, now, self.policy.halves, (self.lasts_S, self.counts_S), times_P)

    def counts_of(self, slots_U: torch.Tensor, now: int) -> torch.Tensor:
        """The counts of these places as they stand in step `now`, 0 where the place is -1; int64."""
        there = slots_U.clamp(min=0)
        return torch.where(slots_U >= 0, self.policy.halved(self.counts_S[there], self.lasts_S[there], now), 0)

    def settle(
        self, ids_O: torch.Tensor, counts_O: torch.Tensor | None, groups_O: torch.Tensor, now: int, compete: bool
    ) -> Settled:
        """Give newcomers a place, which are distinct and have none alive.

        Args:
            counts_O: what their counts begin with, where they are kept.
            groups_O: the bucket of each, as numbered on this rank.
            compete: as in `Rules`.
        """
        expired = self._bury(ids_O)
        if self.room is None:
            dead = self._sweep(ids_O.numel(), now)
            evicted, expired = 0, expired + dead.numel()
            self.leave(dead)
            slots_O = self._append(ids_O)
        else:
            slots_O, fates = self._squeeze(ids_O, counts_O, groups_O, now, compete, self.room)
            evicted, expired = int((fates == EVICTED).sum()), expired + int((fates == DEAD).sum())
        placed = slots_O >= 0
        slots_U = slots_O[placed]
        self.ids_S[slots_U], self.lasts_S[slots_U] = ids_O[placed], now
        if counts_O is not None and self.policy.counts:
            self.counts_S[slots_U] = counts_O[placed].clamp(max=MOST).to(torch.int32)
        self._map.insert(slots_U, self.ids_S)
        return Settled(slots_O, evicted, expired)

    def _bury(self, ids_O: torch.Tensor) -> int:
        """Free the places of those newcomers who have died and come again."""
        if self.policy.lives_on:
            return 0
        slots = self._map.find(ids_O, self.ids_S)
        slots = slots[slots >= 0]
        self.leave(slots)
        return slots.numel()

    def _sweep(self, wanted: int, now: int) -> torch.Tensor:
        """The places of the dead, looked for before memory would grow; without a limit nobody else takes them."""
        enough = self._top + wanted - self._left.numel() <= self.places
        if self.policy.lives_on or enough or now < self._swept + self.policy.lives // SWEEPS:
            return self._left[:0]
        self._swept = now
        lasts = self.lasts_S[: self._top]
        return ((lasts >= 0) & ~self.policy.alive(lasts, now - 1)).nonzero().squeeze(1)

    def _squeeze(
        self, ids_O: torch.Tensor, counts_O: torch.Tensor | None, groups_O: torch.Tensor, now: int, compete: bool, room: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        policy = self.policy
        rules = Rules(room, policy.lives, policy.halves, policy.by_count or compete, policy.evicts or compete, compete)
        counts_O = counts_O if rules.by_count else None
        order = ranked(ids_O, counts_O, groups_O)
        held = self.ids_S, self.counts_S, self.lasts_S
        found = place(ids_O[order], None if counts_O is None else counts_O[order], groups_O[order], now, held, rules)
        slots_O = torch.empty_like(found.slots_O)
        slots_O[order] = found.slots_O
        self._map.erase(found.slots_O[found.fates_O > 0], self.ids_S)
        return slots_O, found.fates_O

    def _append(self, ids_O: torch.Tensor) -> torch.Tensor:
        """Places in the order of ids, the lowest that are free first."""
        count, left = ids_O.numel(), self._left.numel()
        taken, self._left = self._left[: min(count, left)], self._left[min(count, left) :]
        fresh = torch.arange(self._top, self._top + count - taken.numel(), device=self._device)
        self._top += fresh.numel()
        if self._top > MOST:
            raise UnsupportedError(f"a rank holds at most {MOST:,} ids of a dynamic table; use more ranks")
        if self._top > self.places:
            held = self.places
            self.ids_S, self.lasts_S = grown(self.ids_S, self._top), grown(self.lasts_S, self._top)
            self.lasts_S[held:] = FREE
            if self.policy.counts:
                self.counts_S = grown(self.counts_S, self._top)
        slots_O = torch.empty_like(ids_O)
        slots_O[torch.argsort(ids_O)] = torch.cat([taken, fresh])
        return slots_O

    def leave(self, slots_U: torch.Tensor) -> None:
        """These places are free again."""
        self._map.erase(slots_U, self.ids_S)
        self.lasts_S[slots_U] = FREE
        if self.room is None:
            self._left = torch.cat([self._left, slots_U]).sort().values

    def seat(self, ids_U: torch.Tensor, groups_U: torch.Tensor) -> torch.Tensor:
        """Let these ids, which are distinct, and nobody else have a place, as if touched in step 0 and never counted. Returns the
        place of each, int64: in a bucket in the order of ids, which is as good as any, since nothing is decided by places.

        Args:
            groups_U: the bucket of each, as numbered on this rank; no more in one than there is room.
        """
        self.clear()
        if self.room is None:
            slots_U = self._append(ids_U)
        else:
            order = by_group(ids_U.argsort(), groups_U)
            sorted_U = groups_U[order]
            numbers = torch.arange(order.numel(), device=self._device)
            slots_U = torch.empty_like(ids_U)
            slots_U[order] = sorted_U * self.room + numbers - torch.searchsorted(sorted_U, sorted_U)
        self.ids_S[slots_U], self.lasts_S[slots_U] = ids_U, 0
        if self.policy.counts:
            self.counts_S[slots_U] = 0
        self._map.insert(slots_U, self.ids_S)
        return slots_U

    def clear(self) -> None:
        """Nobody is here any more."""
        self._map.clear()
        self.lasts_S.fill_(FREE)
        self._top, self._left, self._swept = 0, self.ids_S[:0], 0
