"""Ids to segments: one call a batch that numbers distinct ids, one a slab, and one for what pools alike in it.

Legend: N ids, F features, T tables, L lanes, U distinct ids, E entries (a key in a segment), S segments, B bags, R ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.hashing import bucket_of
from shardembed.kernels.numba.ordering import runs_of, sorted_words
from shardembed.kernels.numba.tools import compiled


@compiled
def first_outside(ids_N: Any, sizes: Any, limits: Any) -> int:
    """The place of the first id that is negative or not below its feature's limit, where that is not 0; -1 when there is none."""
    first = 0
    for i in range(sizes.size):
        limit = np.uint64(limits[i])
        if limit == 0:
            first += sizes[i]
            continue
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
def distinct(ids_N: Any, sizes_F: Any, by_id: Any, starts_F: Any, starts_T: Any) -> Any:
    """The distinct ids of the features `by_id`.

    Args:
        ids_N: of all features, `sizes_F[f]` of feature f.
        starts_F: where the rows of each feature's table begin when those of all tables are numbered through.
        starts_T: the same of each table, and the end.

    Returns:
        (those ids so numbered, ascending `[U]`; how often each occurs `[U]`; where each table's begin `[T + 1]`; the number of each
        id among them, feature by feature `[N]`).
    """
    firsts_F = np.cumsum(sizes_F) - sizes_F
    count = 0
    for f in by_id:
        count += sizes_F[f]
    numbered_N = np.empty(count, np.int64)
    at = 0
    for f in by_id:
        for n in range(firsts_F[f], firsts_F[f] + sizes_F[f]):
            numbered_N[at] = ids_N[n] + starts_F[f]
            at += 1
    words, low = sorted_words(numbered_N, np.empty(0, np.int64), starts_T[-1])
    ids_U, runs = runs_of(words, low)
    numbers_N, mask = np.empty(count, np.int64), (1 << low) - 1
    for u in range(ids_U.size):
        for place in range(runs[u], runs[u + 1]):
            numbers_N[words[place] & mask] = u
    first_T = np.empty(starts_T.size, np.int64)
    u = 0
    for t in range(starts_T.size):
        while u < ids_U.size and ids_U[u] < starts_T[t]:
            u += 1
        first_T[t] = u
    return ids_U, runs[1:] - runs[:-1], first_T, numbers_N


@compiled
def segment(owner_E: Any, key_E: Any, singles: int, lengths_B: Any, world_size: int, side_by_side: int) -> Any:
    """Entries to segments: the first `singles` entries are one each; of the others, which belong to bags of `lengths_B`, those
    with one owner and one bag are.

    Args:
        side_by_side: so many strips that the bags belong to, one strip after the other, are to stand sample by sample in what is
            returned; 1 leaves them as they are.

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
    e, samples = singles, lengths_B.size // side_by_side
    for b in range(lengths_B.size):
        place = (b % samples) * side_by_side + b // samples
        for _ in range(lengths_B[b]):
            owner = owner_E[e]
            keys_E[next_key[owner]] = key_E[e]
            next_key[owner] += 1
            if last_bag[owner] != b:
                last_bag[owner] = b
                bag_S[next_segment[owner]] = place
                lengths_S[next_segment[owner]] = 1
                next_segment[owner] += 1
                starts_B[place] += 1
            else:
                lengths_S[next_segment[owner] - 1] += 1
            e += 1
    starts_B = np.cumsum(starts_B) - starts_B
    next_of_bag = starts_B.copy()
    segments_of_bags = np.empty(count - singles, np.int64)
    for s in range(count):
        place = bag_S[s]
        if place >= 0:
            segments_of_bags[next_of_bag[place]] = s
            next_of_bag[place] += 1
    return keys_E, lengths_S, counts, segment_of_single, segments_of_bags, starts_B


@compiled
def _block_of(position: int, starts: Any, near: int, guess: int, first: int, last: int) -> int:
    """The block of a lane, which has the blocks `first` to `last`, that a position lies in. near: where the one before did. guess:
    where it is if all are equally long.
    """
    if starts[near] <= position and (near == last or position < starts[near + 1]):
        return near
    guess = min(max(guess, first), last)
    if starts[guess] <= position and (guess == last or position < starts[guess + 1]):
        return guess
    low, length = first, last - first + 1
    while length > 1:
        half = length // 2
        low = low + half if starts[low + half] <= position else low
        length -= half
    return low


@compiled
def _place(ids_N: Any, lane: Any, blocks: Any, owner_E: Any, key_E: Any) -> None:
    """The owner and the key there of each id of one lane. lane, blocks: as `LaneNumbers` and `SlabOwners.blocks`."""
    start, stride, rows, low, first = lane[1], lane[2], lane[3], lane[4], lane[5]
    starts, owners, shifts = blocks[0], blocks[1], blocks[2]
    if stride > 1:  # a residue's number is its block's, so nothing is searched
        inverse = 1.0 / stride
        for n in range(ids_N.size):
            place = ids_N[n] - low
            quotient = np.int64(place * inverse)  # a division takes longer; off by one at most below 2^52 rows
            residue = place - quotient * stride
            if residue < 0:
                quotient, residue = quotient - 1, residue + stride
            elif residue >= stride:
                quotient, residue = quotient + 1, residue - stride
            block = first + residue
            owner_E[n] = owners[block]
            key_E[n] = starts[block] + quotient + shifts[block]
        return
    last = first + lane[6] - 1
    per_row = lane[6] / rows
    near = first
    for n in range(ids_N.size):
        place = ids_N[n] - low
        position = place + start
        near = _block_of(position, starts, near, first + np.int64(place * per_row), first, last)
        owner_E[n] = owners[near]
        key_E[n] = position + shifts[near]


@compiled
def _place_ids(ids_N: Any, lane: Any, blocks: Any, owner_E: Any, key_E: Any) -> None:
    """As `_place`, of ids of a dynamic table, whose buckets are cut; the keys are these ids."""
    buckets_N = np.empty(ids_N.size, np.int64)
    for n in range(ids_N.size):
        buckets_N[n] = bucket_of(ids_N[n], lane[3])
    _place(buckets_N, lane, blocks, owner_E, key_E)
    for n in range(ids_N.size):
        key_E[n] = ids_N[n]


@compiled
def ask(
    ids_U: Any,
    starts_T: Any,
    lanes: Any,
    ids_N: Any,
    sizes_F: Any,
    bag_lanes: Any,
    bags_F: Any,
    lengths_B: Any,
    blocks: Any,
    lone_owner: int,
    keys: Any,
    world_size: int,
    side_by_side: int,
    dynamic: bool,
) -> Any:
    """What to ask of one slab: each distinct id of the tables that are read by id, in all `lanes`, and the bags of what is read by
    bag.

    Args:
        ids_U, starts_T: distinct ids, numbered through all tables, and where each table's begin.
        lanes, bag_lanes: `LaneNumbers`.
        ids_N, sizes_F, bags_F, lengths_B: the batch.
        blocks: `SlabOwners.blocks`.
        lone_owner: who owns all that there is, if that is one rank, else -1.
        keys: an array of the dtype that keys are to have.
        side_by_side: as in `segment`.
        dynamic: the table is, and so ids are any int64.

    Returns:
        (what `segment` does; how far the singles of each lane lie from its distinct ids `[L]`; the number of bags; whether anything
        had to move: if not, single s is segment s, or bag b is).
    """
    shifts_L = np.empty(lanes.shape[1], np.int64)
    singles = 0
    for p in range(lanes.shape[1]):
        table = lanes[0, p]
        shifts_L[p] = singles - starts_T[table]
        singles += starts_T[table + 1] - starts_T[table]
    firsts_F, first_bags_F = np.cumsum(sizes_F) - sizes_F, np.cumsum(bags_F) - bags_F
    entries, bags = singles, 0
    for p in range(bag_lanes.shape[1]):
        entries += sizes_F[bag_lanes[0, p]]
        bags += bags_F[bag_lanes[0, p]]
    owner_E, key_E, lengths = np.empty(entries, np.int64), np.empty(entries, keys.dtype), np.empty(bags, np.int64)
    at = 0
    for p in range(lanes.shape[1]):
        first, last = starts_T[lanes[0, p]], starts_T[lanes[0, p] + 1]
        end = at + last - first
        if dynamic:
            _place_ids(ids_U[first:last], lanes[:, p], blocks, owner_E[at:end], key_E[at:end])
        else:
            _place(ids_U[first:last], lanes[:, p], blocks, owner_E[at:end], key_E[at:end])
        at = end
    bag = 0
    for p in range(bag_lanes.shape[1]):
        f = bag_lanes[0, p]
        end = at + sizes_F[f]
        given = ids_N[firsts_F[f] : firsts_F[f] + sizes_F[f]]
        if dynamic:
            _place_ids(given, bag_lanes[:, p], blocks, owner_E[at:end], key_E[at:end])
        else:
            _place(given, bag_lanes[:, p], blocks, owner_E[at:end], key_E[at:end])
        at = end
        lengths[bag : bag + bags_F[f]] = lengths_B[first_bags_F[f] : first_bags_F[f] + bags_F[f]]
        bag += bags_F[f]
    if lone_owner >= 0 and (singles == 0 or bags == 0) and (lengths > 0).all():
        counts, moved = np.zeros((2, world_size), np.int64), side_by_side > 1
        counts[0, lone_owner], counts[1, lone_owner] = singles + bags, entries
        there = np.empty(bags if moved else 0, np.int64)
        for place in range(there.size):
            there[place] = (place % side_by_side) * (bags // side_by_side) + place // side_by_side
        return key_E, lengths.astype(np.int32), counts, np.arange(singles), there, np.arange(there.size), shifts_L, bags, moved
    found = segment(owner_E, key_E, singles, lengths, world_size, side_by_side)
    keys_E, lengths_S, counts, of_single, bag_segments, bag_starts = found
    return keys_E, lengths_S, counts, of_single, bag_segments, bag_starts, shifts_L, bags, True


@compiled
def read(
    of_single: Any,
    numbers_N: Any,
    shifts_L: Any,
    strips: Any,
    by_id: Any,
    ids_N: Any,
    sizes_F: Any,
    bags_F: Any,
    lengths_B: Any,
    pooled: bool,
    side_by_side: bool,
    padded: bool,
) -> Any:
    """The segment of each id of some strips that pool alike, -1 for padding, and where each bag of them begins, if they do pool.

    Args:
        of_single: the segment of each single. shifts_L: by `ask`.
        numbers_N: of the ids of the features `by_id`, one after the other, their numbers among the distinct ones.
        strips: `IdGroup.strips`.
        ids_N, sizes_F, bags_F, lengths_B: the batch.
        side_by_side: the bags are to stand sample by sample, and not strip by strip; all strips have as many.
        padded: bags leave the padding id of each strip out.
    """
    firsts_F, first_bags_F = np.cumsum(sizes_F) - sizes_F, np.cumsum(bags_F) - bags_F
    first_numbers = np.zeros(sizes_F.size, np.int64)
    at = 0
    for f in by_id:
        first_numbers[f] = at
        at += sizes_F[f]
    count, bags = 0, 0
    for p in range(strips.shape[1]):
        count += sizes_F[strips[0, p]]
        bags += bags_F[strips[0, p]] if pooled else 0
    segments_N, starts_B = np.empty(count, np.int64), np.empty(bags, np.int64)
    apart, first = strips.shape[1] if side_by_side else 1, 0
    for p in range(strips.shape[1] if pooled else 0):
        f, first = strips[0, p], p if side_by_side else first
        for b in range(bags_F[f]):
            starts_B[first + b * apart] = lengths_B[first_bags_F[f] + b]
        first += bags_F[f]
    starts_B = np.cumsum(starts_B) - starts_B
    at, first = 0, 0
    for p in range(strips.shape[1]):
        f, shift, padding = strips[0, p], shifts_L[strips[1, p]], strips[2, p]
        if not pooled:
            for n in range(first_numbers[f], first_numbers[f] + sizes_F[f]):
                segments_N[at] = of_single[numbers_N[n] + shift]
                at += 1
            continue
        first, n = p if side_by_side else first, 0
        for b in range(bags_F[f]):
            at = starts_B[first + b * apart]
            for _ in range(lengths_B[first_bags_F[f] + b]):
                is_padding = padded and ids_N[firsts_F[f] + n] == padding
                segments_N[at] = -1 if is_padding else of_single[numbers_N[first_numbers[f] + n] + shift]
                at += 1
                n += 1
        first += bags_F[f]
    return segments_N, starts_B
