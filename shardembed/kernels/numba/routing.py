"""Ids to segments in two passes over them: count, then put in place.

Legend: E entries (a key in a segment), S segments, B bags, R ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.tools import compiled


@compiled
def first_outside(ids_N: Any, sizes: Any, limits: Any) -> int:
    """The place of the first id that is negative or not below its feature's limit; -1 when there is none."""
    first = 0
    for i in range(sizes.size):
        limit = np.uint64(limits[i])
        bad = 0
        for n in range(first, first + sizes[i]):  # counted and not looked for, so that it takes vector instructions
            bad += np.uint64(ids_N[n]) >= limit  # a negative id is a large unsigned one
        if bad:
            for n in range(first, first + sizes[i]):
                if np.uint64(ids_N[n]) >= limit:
                    return n
        first += sizes[i]
    return -1


@compiled
def positions(ids_N: Any, sizes: Any, features: Any, starts: Any, strides: Any, rows: Any, lows: Any) -> Any:
    """As `route.ownership.positions_of`, for the ids of several features one after the other. sizes: ids of each feature of the
    batch. lows: what stands for row 0.
    """
    firsts = np.cumsum(sizes) - sizes
    count = 0
    for feature in features:
        count += sizes[feature]
    found = np.empty(count, np.int64)
    at = 0
    for p in range(features.size):
        first, size, stride, start = firsts[features[p]], sizes[features[p]], strides[p], starts[p]
        base, extra = rows[p] // stride, rows[p] % stride
        shift = 0
        while (1 << shift) < stride:
            shift += 1
        for n in range(first, first + size):
            place = ids_N[n] - lows[p]
            if stride > 1:  # a division takes longer than all the rest, and most strides are powers of two
                quotient = place >> shift if stride == 1 << shift else place // stride
                residue = place - quotient * stride
                place = residue * base + min(residue, extra) + quotient
            found[at] = place + start
            at += 1
    return found


@compiled
def _block_of(position: int, starts: Any, near: int) -> int:
    """The block that a position lies in; `near` is where the last one did."""
    last = starts.size - 1
    if starts[near] <= position and (near == last or position < starts[near + 1]):
        return near
    low, length = 0, last + 1
    while length > 1:
        half = length // 2
        low = low + half if starts[low + half] <= position else low
        length -= half
    return low


@compiled
def locate(positions_E: Any, starts: Any, owners: Any, shifts: Any) -> Any:
    """(owner rank, key in that owner's slab) of each position."""
    owner_E, key_E = np.empty_like(positions_E), np.empty_like(positions_E)
    block = 0
    for e in range(positions_E.size):
        block = _block_of(positions_E[e], starts, block)
        owner_E[e] = owners[block]
        key_E[e] = positions_E[e] + shifts[block]
    return owner_E, key_E


@compiled
def look_up(segment_of_single: Any, numbers_N: Any, sizes: Any, features: Any, shifts: Any) -> Any:
    """The segment of each id of some `features`, one after the other: that of single number + shift.

    numbers_N: of the ids of all features, `sizes[i]` of feature i.
    """
    firsts = np.cumsum(sizes) - sizes
    count = 0
    for feature in features:
        count += sizes[feature]
    found = np.empty(count, np.int64)
    at = 0
    for p in range(features.size):
        first = firsts[features[p]]
        for n in range(first, first + sizes[features[p]]):
            found[at] = segment_of_single[numbers_N[n] + shifts[p]]
            at += 1
    return found


@compiled
def segment(owner_E: Any, key_E: Any, singles: int, lengths_B: Any, world_size: int) -> Any:
    """Entries to segments: the first `singles` entries are one each; of the others, which belong to bags of `lengths_B`, those
    with one owner and one bag are.

    Returns (keys by owner `[E]`, keys of each segment `[S]`, segments and keys to each rank `[2, R]`, the segment of each single,
    segments bag by bag `[S - singles]`, where each bag's begin `[B]`).
    """
    counts = np.zeros((2, world_size), np.int64)
    segments_R, keys_R = counts[0], counts[1]
    last_bag = np.full(world_size, -1, np.int64)
    for e in range(singles):
        keys_R[owner_E[e]] += 1
        segments_R[owner_E[e]] += 1
    e = singles
    for b in range(lengths_B.size):
        for _ in range(lengths_B[b]):
            owner = owner_E[e]
            keys_R[owner] += 1
            if last_bag[owner] != b:
                last_bag[owner] = b
                segments_R[owner] += 1
            e += 1
    next_key, next_segment = np.cumsum(keys_R) - keys_R, np.cumsum(segments_R) - segments_R
    count = segments_R.sum()
    keys_E, lengths_S, bag_S = np.empty_like(key_E), np.empty(count, np.int32), np.full(count, -1, np.int64)
    segment_of_single = np.empty(singles, np.int64)
    for e in range(singles):
        owner = owner_E[e]
        keys_E[next_key[owner]] = key_E[e]
        next_key[owner] += 1
        segment_of_single[e] = next_segment[owner]
        lengths_S[next_segment[owner]] = 1
        next_segment[owner] += 1
    last_bag[:] = -1
    starts_B = np.zeros(lengths_B.size, np.int64)
    e = singles
    for b in range(lengths_B.size):
        for _ in range(lengths_B[b]):
            owner = owner_E[e]
            keys_E[next_key[owner]] = key_E[e]
            next_key[owner] += 1
            if last_bag[owner] != b:
                last_bag[owner] = b
                bag_S[next_segment[owner]] = b
                lengths_S[next_segment[owner]] = 1
                next_segment[owner] += 1
                starts_B[b] += 1
            else:
                lengths_S[next_segment[owner] - 1] += 1
            e += 1
    starts_B = np.cumsum(starts_B) - starts_B
    next_of_bag = starts_B.copy()
    segments_of_bags = np.empty(count - singles, np.int64)
    for s in range(count):
        b = bag_S[s]
        if b >= 0:
            segments_of_bags[next_of_bag[b]] = s
            next_of_bag[b] += 1
    return keys_E, lengths_S, counts, segment_of_single, segments_of_bags, starts_B
