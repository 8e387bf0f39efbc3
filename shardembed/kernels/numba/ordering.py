"""Sorting of whole numbers by their digits (radix sort): stable, and in time proportional to how many there are.

Number and place are sorted as one word, the place in the low bits, so that each pass moves one array.

Legend: E numbers, U distinct ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.tools import compiled

WORD = 63  # bits that a number and its place may have together
MANY = 4096  # numbers; fewer are sorted by short digits, whose tables cost nothing to clear
SHORT, LONG = 6, 12  # bits of a digit; 2^12 counters fit the first cache


@compiled
def bits_of(limit: int) -> int:
    """How many bits the numbers below `limit` take."""
    bits = 1
    while bits < WORD and limit > (1 << bits):
        bits += 1
    return bits


@compiled
def sort_words(words_E: Any, low: int, bits: int) -> Any:
    """The words sorted by the `bits` above the `low` ones. Overwrites the array."""
    count = words_E.size
    passes = -(-bits // (LONG if count >= MANY else SHORT))
    digit = -(-bits // passes)
    size, mask = 1 << digit, (1 << digit) - 1
    at = np.zeros((passes, size), np.int64)
    for e in range(count):
        number = words_E[e] >> low
        for p in range(passes):
            at[p, (number >> (p * digit)) & mask] += 1
    for p in range(passes):
        before = 0
        for i in range(size):
            here = at[p, i]
            at[p, i] = before
            before += here
    other_E = np.empty_like(words_E)
    for p in range(passes):
        starts, shift = at[p], low + p * digit
        for e in range(count):
            word = words_E[e]
            d = (word >> shift) & mask
            other_E[starts[d]] = word
            starts[d] += 1
        words_E, other_E = other_E, words_E
    return words_E


@compiled
def _places(words_E: Any, low: int) -> Any:
    mask = (1 << low) - 1
    for e in range(words_E.size):
        words_E[e] &= mask
    return words_E


@compiled
def runs_of(words_E: Any, low: int) -> Any:
    """(the distinct numbers, where the words of each begin, `[U + 1]`)."""
    count = words_E.size
    distinct, last = 0, np.int64(-1)
    for e in range(count):
        number = words_E[e] >> low
        distinct += number != last
        last = number
    numbers_U, starts = np.empty(distinct, np.int64), np.empty(distinct + 1, np.int64)
    u, last = 0, np.int64(-1)
    for e in range(count):
        number = words_E[e] >> low
        if number != last:
            numbers_U[u] = number
            starts[u] = e
            u += 1
            last = number
    starts[distinct] = count
    return numbers_U, starts


@compiled
def _words(numbers_E: Any, low: int) -> Any:
    words_E = np.empty(numbers_E.size, np.int64)
    for e in range(numbers_E.size):
        words_E[e] = (np.int64(numbers_E[e]) << low) | e
    return words_E


@compiled
def stable_order(numbers_E: Any, limit: int) -> Any:
    """The order that sorts numbers from 0 to below `limit` and keeps equal ones as they stand, int64."""
    low = bits_of(numbers_E.size)
    return _places(sort_words(_words(numbers_E, low), low, bits_of(limit)), low)


@compiled
def group(numbers_E: Any, limit: int) -> Any:
    """(distinct numbers `[U]`, ascending; where each one's entries begin in the order, `[U + 1]`; the order `[E]`)."""
    low = bits_of(numbers_E.size)
    words_E = sort_words(_words(numbers_E, low), low, bits_of(limit))
    numbers_U, starts = runs_of(words_E, low)
    return numbers_U, starts, _places(words_E, low)


@compiled
def group_segments(rows_E: Any, offsets: Any, limit: int) -> Any:
    """As `group`, but of each entry not its place but its segment: segment s has the entries from `offsets[s]` to
    `offsets[s + 1]`.
    """
    low = bits_of(offsets.size)
    words_E = np.empty(rows_E.size, np.int64)
    for s in range(offsets.size - 1):
        for e in range(offsets[s], offsets[s + 1]):
            words_E[e] = (np.int64(rows_E[e]) << low) | s
    words_E = sort_words(words_E, low, bits_of(limit))
    rows_U, starts = runs_of(words_E, low)
    return rows_U, starts, _places(words_E, low)


@compiled
def inverse_of(order_E: Any, starts: Any) -> Any:
    """The number of each entry's group, `[E]`."""
    inverse = np.empty(order_E.size, np.int64)
    for u in range(starts.size - 1):
        for place in range(starts[u], starts[u + 1]):
            inverse[order_E[place]] = u
    return inverse
