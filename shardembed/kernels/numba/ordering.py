"""Sorting of whole numbers by their digits (radix sort): stable, and in time proportional to how many there are.

Legend: E numbers, U distinct ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.tools import compiled

MANY = 4096  # numbers; fewer are sorted by short digits, whose tables cost nothing to clear
SHORT, LONG = 6, 12  # bits of a digit; 2^12 counters fit the first cache


@compiled
def stable_order(numbers_E: Any, limit: int) -> Any:
    """(the order that sorts numbers from 0 to below `limit` and keeps equal ones as they stand, the sorted numbers), int64."""
    count = numbers_E.size
    longest = LONG if count >= MANY else SHORT
    bits = 1
    while limit > (1 << bits) and bits < 62:
        bits += 1
    passes = -(-bits // longest)
    digit = -(-bits // passes)
    size, mask = 1 << digit, (1 << digit) - 1
    at = np.zeros((passes, size), np.int64)
    for e in range(count):
        number = numbers_E[e]
        for p in range(passes):
            at[p, (number >> (p * digit)) & mask] += 1
    for p in range(passes):
        before = 0
        for i in range(size):
            here = at[p, i]
            at[p, i] = before
            before += here
    order, keys = np.empty(count, np.int64), np.empty(count, np.int64)
    other_order, other_keys = np.empty(count, np.int64), np.empty(count, np.int64)
    for e in range(count):
        number = np.int64(numbers_E[e])
        place = at[0, number & mask]
        at[0, number & mask] = place + 1
        order[place] = e
        keys[place] = number
    for p in range(1, passes):
        starts, shift = at[p], p * digit
        for e in range(count):
            number = keys[e]
            d = (number >> shift) & mask
            place = starts[d]
            starts[d] = place + 1
            other_order[place] = order[e]
            other_keys[place] = number
        order, other_order = other_order, order
        keys, other_keys = other_keys, keys
    return order, keys


@compiled
def group(numbers_E: Any, limit: int) -> Any:
    """(distinct numbers `[U]`, ascending; where each one's entries begin in the order, `[U + 1]`; the order `[E]`)."""
    order, keys = stable_order(numbers_E, limit)
    count = keys.size
    distinct = 0
    for e in range(count):
        distinct += e == 0 or keys[e] != keys[e - 1]
    numbers_U, starts = np.empty(distinct, np.int64), np.empty(distinct + 1, np.int64)
    u = 0
    for e in range(count):
        if e == 0 or keys[e] != keys[e - 1]:
            numbers_U[u] = keys[e]
            starts[u] = e
            u += 1
    starts[distinct] = count
    return numbers_U, starts, order


@compiled
def inverse_of(order_E: Any, starts: Any) -> Any:
    """The number of each entry's group, `[E]`."""
    inverse = np.empty(order_E.size, np.int64)
    for u in range(starts.size - 1):
        for place in range(starts[u], starts[u + 1]):
            inverse[order_E[place]] = u
    return inverse


@compiled
def segments_of(offsets: Any, order_E: Any) -> Any:
    """The segment of each entry, in the order given, `[E]`; segment s has the entries from `offsets[s]` to `offsets[s + 1]`."""
    segment_E = np.empty(order_E.size, np.int64)
    for s in range(offsets.size - 1):
        for e in range(offsets[s], offsets[s + 1]):
            segment_E[e] = s
    found = np.empty(order_E.size, np.int64)
    for place in range(order_E.size):
        found[place] = segment_E[order_E[place]]
    return found
