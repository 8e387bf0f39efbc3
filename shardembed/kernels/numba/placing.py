"""What a step makes of ids (`kernels.placing`), one after the other.

Legend: E entries, P ids without a slot, O newcomers, S slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.elements import fetch, fetch_each, load, store
from shardembed.kernels.numba.hashing import mixed_of
from shardembed.kernels.numba.ordering import stable_order
from shardembed.kernels.numba.tools import called, compiled

AHEAD = 16  # entries between asking for what lies in memory and reading it
FREE, DEAD, NOBODY = -2, -1, (1 << 63) - 1  # below and above all ranks of those who may leave
LOWEST = -(1 << 63)
MOST = (1 << 31) - 1


@compiled
def meet(slots_E: Any, times_E: Any, now: int, halves: int, lasts_S: Any, counts_S: Any, times_P: Any) -> None:
    """times_E: empty where each was met once."""
    slots, counting, halving = lasts_S.size, counts_S.size > 0, halves <= now
    for e in range(slots_E.size):
        if e + AHEAD < slots_E.size:
            ahead = load(slots_E, e + AHEAD)  # wherever that is: memory that is only asked for need not be there
            fetch(lasts_S, ahead)
            if counting:
                fetch(counts_S, ahead)
        slot, times = load(slots_E, e), np.int64(1)
        if slot < 0:
            continue
        if times_E.size:
            times = np.int64(load(times_E, e))
        if slot >= slots:
            store(times_P, slot - slots, load(times_P, slot - slots) + times)
            continue
        if counting:
            count = np.int64(load(counts_S, slot))
            if halving:
                count >>= min(now // halves - np.int64(load(lasts_S, slot)) // halves, 62)  # by 0 from the second time on
            store(counts_S, slot, np.int32(min(count + times, MOST)))
        store(lasts_S, slot, np.int32(now))


@compiled
def redirect(slots_E: Any, base: int, slots_P: Any) -> Any:
    found_E = np.empty_like(slots_E)
    for e in range(slots_E.size):
        slot = slots_E[e]
        found_E[e] = slot if slot < base else slots_P[slot - base]
    return found_E


@called
def _below(count: int, name: int, other_count: int, other_name: int) -> bool:
    """Whether a newcomer ranks below another."""
    return name < other_name if count == other_count else count < other_count


@compiled
def ranked(ids_O: Any, counts_O: Any, groups_O: Any, limit: int) -> Any:
    """As `placing.ranked`; groups are below `limit`. counts_O: all 0 where they do not matter."""
    order_O, names_O = stable_order(groups_O, limit), np.empty(ids_O.size, np.int64)
    for o in range(ids_O.size):
        store(names_O, o, mixed_of(load(ids_O, o)) ^ LOWEST)
    first = 0
    while first < order_O.size:
        stop = first + 1
        while stop < order_O.size and groups_O[order_O[stop]] == groups_O[order_O[first]]:
            stop += 1
        # Sorted as a heap with the lowest on top, which goes to the end, one after the other.
        size = stop - first
        root = size // 2
        while size > 1:
            if root > 0:
                root -= 1
            else:
                size -= 1
                order_O[first], order_O[first + size] = order_O[first + size], order_O[first]
            parent = root
            sinks = load(order_O, first + parent)
            count, name = load(counts_O, sinks), load(names_O, sinks)
            while 2 * parent + 1 < size:
                child = 2 * parent + 1
                one = load(order_O, first + child)
                if child + 1 < size:
                    other = load(order_O, first + child + 1)
                    if _below(load(counts_O, other), load(names_O, other), load(counts_O, one), load(names_O, one)):
                        child, one = child + 1, other
                if _below(count, name, load(counts_O, one), load(names_O, one)):
                    break
                store(order_O, first + parent, one)
                parent = child
            store(order_O, first + parent, sinks)
        first = stop
    return order_O


@called
def _rate(
    first: int,
    now: int,
    lasts_S: Any,
    counts_S: Any,
    lives: int,
    halves: int,
    by_count: bool,
    evicts: bool,
    compete: bool,
    ranks_R: Any,
) -> None:
    """Of each slot of a bucket how it ranks: FREE, DEAD, by count and step, or NOBODY's to take."""
    halving, epoch = halves <= now, now // halves
    for place in range(ranks_R.size):
        last = np.int64(load(lasts_S, first + place))
        rank = last
        if by_count:
            count = np.int64(load(counts_S, first + place))
            if halving:
                count >>= min(epoch - max(last, 0) // halves, 62)
            rank |= count << 32
        rank = rank if evicts and (compete or last != now) else NOBODY
        rank = DEAD if last + lives < now else rank
        store(ranks_R, place, FREE if last < 0 else rank)


@compiled
def place(
    ids_O: Any,
    counts_O: Any,
    groups_O: Any,
    now: int,
    ids_S: Any,
    counts_S: Any,
    lasts_S: Any,
    room: int,
    lives: int,
    halves: int,
    by_count: bool,
    evicts: bool,
    compete: bool,
) -> Any:
    """(the slot of each newcomer or -1, what became of whoever had it). Nothing that is given is written."""
    slots_O, fates_O = np.full(ids_O.size, -1, np.int64), np.zeros(ids_O.size, np.int64)
    ranks_R = np.empty(room, np.int64)
    group = np.int64(-1)
    for o in range(ids_O.size):
        if o + 1 < ids_O.size and groups_O[o + 1] != groups_O[o]:
            fetch_each((lasts_S,), groups_O[o + 1] * room, room)
            if by_count:
                fetch_each((counts_S,), groups_O[o + 1] * room, room)
        first = groups_O[o] * room
        if groups_O[o] != group:
            group = groups_O[o]
            _rate(first, now, lasts_S, counts_S, lives, halves, by_count, evicts, compete, ranks_R)
        lowest = NOBODY
        for place in range(room):
            lowest = min(lowest, load(ranks_R, place))
        if lowest == NOBODY:
            continue
        best, name = -1, np.int64(0)
        for place in range(room):
            if load(ranks_R, place) != lowest:
                continue
            other = mixed_of(ids_S[first + place]) ^ LOWEST if lowest >= 0 else place
            if best < 0 or other < name:
                best, name = place, other
        if lowest >= 0 and compete:
            mine = (min(counts_O[o], MOST) << 32) | now if by_count else np.int64(now)
            if mine < lowest or (mine == lowest and (mixed_of(ids_O[o]) ^ LOWEST) < name):
                continue
        ranks_R[best] = NOBODY
        slots_O[o] = first + best
        fates_O[o] = 2 if lowest >= 0 else lowest - FREE
    return slots_O, fates_O
