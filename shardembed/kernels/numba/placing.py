"""What a step makes of ids (`kernels.placing`), one after the other.

Legend: E entries, P ids without a slot, O newcomers, S slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.hashing import mixed_of
from shardembed.kernels.numba.tools import compiled

FREE, DEAD, RANKED, NONE = 0, 1, 2, 3
LOWEST = -(1 << 63)
MOST = (1 << 31) - 1


@compiled
def meet(slots_E: Any, times_E: Any, now: int, halves: int, lasts_S: Any, counts_S: Any, times_P: Any) -> None:
    """times_E: empty where each was met once."""
    for e in range(slots_E.size):
        slot, times = slots_E[e], np.int64(1)
        if slot < 0:
            continue
        if times_E.size:
            times = np.int64(times_E[e])
        if slot >= lasts_S.size:
            times_P[slot - lasts_S.size] += times
            continue
        if counts_S.size:
            count, last = np.int64(counts_S[slot]), np.int64(lasts_S[slot])
            if last != now:  # the first time in this step
                count >>= min(now // halves - last // halves, 62)
            counts_S[slot] = min(count + times, MOST)
        lasts_S[slot] = now


@compiled
def redirect(slots_E: Any, base: int, slots_P: Any) -> Any:
    found_E = np.empty_like(slots_E)
    for e in range(slots_E.size):
        slot = slots_E[e]
        found_E[e] = slot if slot < base else slots_P[slot - base]
    return found_E


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
    taken = np.zeros(room, np.bool_)
    group = np.int64(-1)
    for o in range(ids_O.size):
        if groups_O[o] != group:
            group, taken[:] = groups_O[o], False
        first = group * room
        best, standing = -1, NONE
        fame, last, name = np.int64(0), np.int64(0), np.int64(0)
        for place in range(room):
            if taken[place]:
                continue
            s = first + place
            touched = np.int64(lasts_S[s])
            if touched < 0:
                best, standing = place, FREE
                break
            if touched + lives < now:
                if standing > DEAD:
                    best, standing = place, DEAD
                continue
            if standing < RANKED or not evicts or (touched == now and not compete):
                continue
            count = np.int64(0)
            if by_count:
                count = np.int64(counts_S[s]) >> min(now // halves - touched // halves, 62)
            lower = count < fame or (count == fame and touched < last)
            same = count == fame and touched == last
            if standing == NONE or lower or (same and (mixed_of(ids_S[s]) ^ LOWEST) < name):
                best, standing = place, RANKED
                fame, last, name = count, touched, mixed_of(ids_S[s]) ^ LOWEST
        if standing == NONE:
            continue
        if standing == RANKED and compete:
            mine = counts_O[o] if by_count else np.int64(0)
            if mine < fame or (mine == fame and (now < last or (now == last and (mixed_of(ids_O[o]) ^ LOWEST) < name))):
                continue
        taken[best] = True
        slots_O[o], fates_O[o] = first + best, standing
    return slots_O, fates_O
