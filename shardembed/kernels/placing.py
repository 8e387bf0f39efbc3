"""What a step makes of ids: who was met, which newcomers get a place in a full bucket, and who leaves for them. In plain torch, the
truth, and compiled.

A bucket is `room` slots side by side. Free slots go first, then those of the dead, then, where the table evicts, those of whoever
ranks lowest. The result depends on ids, counts and steps alone, so every plan decides alike.

Legend: E entries, P ids without a slot, O newcomers, G buckets, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from shardembed.kernels.grouping import compiled, sorts
from shardembed.kernels.mixing import mixed

LOWEST = -(1 << 63)
MOST = (1 << 31) - 1  # counts stop there
STAYS, DEAD, EVICTED = 0, 1, 2  # what became of whoever had the slot


@dataclass(frozen=True)
class Rules:
    """How places are given.

    Attributes:
        room: slots of each bucket.
        lives: steps that a row outlives its last gradient.
        halves: steps after which counts are halved.
        by_count: the lowest count ranks lowest; else whoever was touched the longest ago.
        evicts: those who are there leave; else only free places and those of the dead are given.
        compete: newcomers have to rank above whoever leaves, who may have been touched in this step; else they rank above all but
            those, who stay.
    """

    room: int
    lives: int
    halves: int
    by_count: bool
    evicts: bool
    compete: bool = False


@dataclass(frozen=True)
class Placed:
    """What came of it.

    Attributes:
        slots_O: of each newcomer, -1 where it has none.
        fates_O: `DEAD` or `EVICTED` where somebody had it before, else `STAYS`.
    """

    slots_O: torch.Tensor
    fates_O: torch.Tensor


def meet(
    slots_E: torch.Tensor,
    times_E: torch.Tensor | None,
    now: int,
    halves: int,
    held: tuple[torch.Tensor, torch.Tensor],
    times_P: torch.Tensor,
) -> None:
    """Note in which step ids were met, and count them where counts are kept; add up those without a slot.

    Args:
        slots_E: of each id its slot; those without one have numbers behind all slots; below 0 is nobody.
        times_E: how often each was met; None for once.
        now: this step. halves: steps after which counts are halved.
        held: of each slot the step in which it was met last, int32, and its count, int32, empty where none are kept. Written.
        times_P: how often each without a slot was met, int64. Added to.
    """
    lasts_S, counts_S = held
    if (kernels := compiled(slots_E.device)) is not None:
        times = lasts_S.numpy()[:0] if times_E is None else _array(times_E.to(torch.int32))
        kernels.placing.meet(_array(slots_E), times, now, halves, lasts_S.numpy(), counts_S.numpy(), times_P.numpy())
        return
    times_E = torch.ones_like(slots_E) if times_E is None else times_E.to(torch.int64)
    slots, base = lasts_S.numel(), slots_E >= lasts_S.numel()
    times_P.index_add_(0, slots_E[base] - slots, times_E[base])
    here = (slots_E >= 0) & ~base
    slots_E, times_E = slots_E[here], times_E[here]
    if counts_S.numel():
        slots_U, inverse = torch.unique(slots_E, return_inverse=True)
        times_U = torch.zeros_like(slots_U).index_add_(0, inverse, times_E)
        before_U = lasts_S[slots_U].to(torch.int64)
        counts_U = counts_S[slots_U].to(torch.int64) >> (now // halves - before_U // halves).clamp(max=62)
        counts_S[slots_U] = (counts_U + times_U).clamp(max=MOST).to(torch.int32)
    lasts_S[slots_E] = now


def redirect(slots_E: torch.Tensor, base: int, slots_P: torch.Tensor) -> torch.Tensor:
    """The same slots, where those from `base` on are replaced by what `slots_P` has for them."""
    if (kernels := compiled(slots_E.device)) is not None:
        return torch.from_numpy(kernels.placing.redirect(slots_E.numpy(), base, slots_P.numpy()))
    return torch.where(slots_E >= base, slots_P[(slots_E - base).clamp(min=0)], slots_E) if slots_P.numel() else slots_E


def ranked(ids_O: torch.Tensor, counts_O: torch.Tensor | None, groups_O: torch.Tensor) -> torch.Tensor:
    """The order of newcomers, `[O]`: bucket by bucket, in each those of the highest count first, then of the highest mixed id."""
    if (kernels := compiled(ids_O.device)) is not None and ids_O.numel():
        counts, limit = torch.zeros_like(ids_O) if counts_O is None else counts_O, int(groups_O.max()) + 1
        if sorts(ids_O.numel(), limit):
            return torch.from_numpy(kernels.placing.ranked(_array(ids_O), _array(counts), _array(groups_O), limit))
    order = torch.argsort(signed(mixed(ids_O)), descending=True)
    if counts_O is not None:
        order = order[torch.argsort(counts_O[order], descending=True, stable=True)]
    return by_group(order, groups_O)


def by_group(order: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """The same order within each bucket, and one bucket after the other."""
    return order[torch.argsort(groups[order], stable=True)]


def signed(mixed_: torch.Tensor) -> torch.Tensor:
    """Unsigned numbers in int64 as signed ones in the same order."""
    return mixed_ ^ LOWEST


def place(
    ids_O: torch.Tensor,
    counts_O: torch.Tensor | None,
    groups_O: torch.Tensor,
    now: int,
    held: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rules: Rules,
) -> Placed:
    """Find a place for each newcomer. Nothing is changed.

    Args:
        ids_O: distinct, none of which has a place, ordered by `ranked`. counts_O: int64; None where counts are not kept.
        groups_O: the bucket of each, which has the slots from `groups_O * room` on.
        now: this step.
        held: of each slot its id, its count (empty where they are not kept), and the step in which it was touched last, below 0
            where it is free.
    """
    ids_S, counts_S, lasts_S = held
    counts_O = torch.zeros_like(ids_O) if counts_O is None else counts_O
    if (kernels := compiled(ids_O.device)) is not None:
        given = _array(ids_O), _array(counts_O), _array(groups_O), now
        numbers = rules.room, rules.lives, rules.halves, rules.by_count, rules.evicts, rules.compete
        found = kernels.placing.place(*given, ids_S.numpy(), counts_S.numpy(), lasts_S.numpy(), *numbers)
        return Placed(*map(torch.from_numpy, found))
    return _place(ids_O, counts_O, groups_O, now, ids_S, counts_S, lasts_S, rules)


def _place(
    ids_O: torch.Tensor,
    counts_O: torch.Tensor,
    groups_O: torch.Tensor,
    now: int,
    ids_S: torch.Tensor,
    counts_S: torch.Tensor,
    lasts_S: torch.Tensor,
    rules: Rules,
) -> Placed:
    device, count = ids_O.device, ids_O.numel()
    groups_G, group_of_O, sizes_G = torch.unique_consecutive(groups_O, return_inverse=True, return_counts=True)
    members = groups_G.unsqueeze(1) * rules.room + torch.arange(rules.room, device=device)  # [G, room]
    last, name = lasts_S[members].to(torch.int64), signed(mixed(ids_S[members]))
    fame = counts_S[members].to(torch.int64) if counts_S.numel() else torch.zeros_like(last)
    fame = fame >> (now // rules.halves - last.clamp(min=0) // rules.halves).clamp(max=62)
    free = last < 0
    dead = ~free & (last + rules.lives < now)
    pinned = ~free & ~dead & ((last == now) & (not rules.compete) | (not rules.evicts))
    standing = torch.full_like(last, 2).masked_fill(free, 0).masked_fill(dead, 1).masked_fill(pinned, 3)
    by_place = torch.arange(rules.room, device=device).expand_as(last)
    # By standing, then as they rank; the free and the dead in the order of their slots.
    keys = [torch.where(standing == 2, name, by_place), torch.where(standing == 2, last, 0)]
    if rules.by_count:
        keys.append(torch.where(standing == 2, fame, 0))
    order = by_place
    for key in (*keys, standing):
        order = order.gather(1, torch.argsort(key.gather(1, order), dim=1, stable=True))
    turn_O = torch.arange(count, device=device) - (sizes_G.cumsum(0) - sizes_G)[group_of_O]  # of each newcomer in its bucket
    seat_O = order[group_of_O, turn_O.clamp(max=rules.room - 1)]
    standing_O = standing[group_of_O, seat_O]
    given = (turn_O < rules.room) & (standing_O < 3)
    if rules.compete:
        here = group_of_O, seat_O
        theirs = (fame[here], last[here], name[here]) if rules.by_count else (last[here], name[here])
        mine = (counts_O, torch.full_like(counts_O, now), signed(mixed(ids_O)))[0 if rules.by_count else 1 :]
        given &= (standing_O < 2) | _above(mine, theirs)
    slots_O = torch.where(given, groups_O * rules.room + seat_O, -1)
    return Placed(slots_O, torch.where(given, standing_O, STAYS))


def _above(mine: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Whether what is mine ranks higher, compared number by number."""
    above, same = torch.zeros_like(mine[0], dtype=torch.bool), torch.ones_like(mine[0], dtype=torch.bool)
    for one, other in zip(mine, theirs, strict=True):
        above |= same & (one > other)
        same &= one == other
    return above


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.contiguous().numpy()
