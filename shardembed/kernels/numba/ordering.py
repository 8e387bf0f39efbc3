"""Sorting of whole numbers by their digits (radix sort): stable, and in time proportional to how many there are.

Number and place are sorted as one word, the place in the low bits, so that each pass moves one array.

Legend: E numbers, U distinct ones.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.elements import load, store
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
def _is_sorted(numbers_E: Any) -> bool:
    e = 1
    while e < numbers_E.size and load(numbers_E, e) >= load(numbers_E, e - 1):
        e += 1
    return e >= numbers_E.size


@compiled
def sorted_words(numbers_E: Any, offsets: Any, limit: int) -> Any:
    """Numbers from 0 to below `limit` and the place of each, as words in ascending order; and how many bits a place has.

    Args:
        offsets: where the place is a segment's: segment s has the entries from `offsets[s]` to `offsets[s + 1]`. Else empty.
    """
    count, segments = numbers_E.size, offsets.size - 1
    low, bits = bits_of(max(count, segments)), bits_of(limit)
    if _is_sorted(numbers_E):
        bits = 0
    passes = -(-bits // (LONG if count >= MANY else SHORT))
    digit = -(-bits // max(passes, 1))
    mask = (1 << digit) - 1
    at = np.zeros(passes << digit, np.int64)  # where the next number with each digit goes, pass by pass
    for e in range(count):
        number = np.int64(load(numbers_E, e))
        for p in range(passes):
            d = (p << digit) | (number & mask)
            store(at, d, load(at, d) + 1)
            number >>= digit
    for p in range(passes):
        before = 0
        for d in range(p << digit, (p + 1) << digit):
            here = load(at, d)
            store(at, d, before)
            before += here
    words_E, other_E = np.empty(count, np.int64), np.empty(count if passes > 1 else 0, np.int64)
    for s in range(segments if segments >= 0 else count):  # the first pass makes the words
        first, last = (offsets[s], offsets[s + 1]) if segments >= 0 else (s, s + 1)
        for e in range(first, last):
            number, target = np.int64(load(numbers_E, e)), e
            if passes > 0:
                target = load(at, number & mask)
                store(at, number & mask, target + 1)
            store(words_E, target, (number << low) | s)
    for p in range(1, passes):
        first, shift = p << digit, low + p * digit
        for e in range(count):
            word = load(words_E, e)
            d = first | ((word >> shift) & mask)
            target = load(at, d)
            store(other_E, target, word)
            store(at, d, target + 1)
        words_E, other_E = other_E, words_E
    return words_E, low


@compiled
def places_of(words_E: Any, low: int) -> Any:
    """The places alone. Overwrites the array."""
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
def stable_order(numbers_E: Any, limit: int) -> Any:
    """The order that sorts numbers from 0 to below `limit` and keeps equal ones as they stand, int64."""
    words_E, low = sorted_words(numbers_E, np.empty(0, np.int64), limit)
    return places_of(words_E, low)


@compiled
def group(numbers_E: Any, offsets: Any, limit: int) -> Any:
    """(distinct numbers `[U]`, ascending; where each one's entries begin in the order, `[U + 1]`; the order `[E]`).

    Args:
        offsets: as in `sorted_words`; the order then names not entries but their segments.
    """
    words_E, low = sorted_words(numbers_E, offsets, limit)
    numbers_U, starts = runs_of(words_E, low)
    return numbers_U, starts, places_of(words_E, low)


@compiled
def inverse_of(order_E: Any, starts: Any) -> Any:
    """The number of each entry's group, `[E]`."""
    inverse = np.empty(order_E.size, np.int64)
    for u in range(starts.size - 1):
        for place in range(starts[u], starts[u + 1]):
            inverse[order_E[place]] = u
    return inverse
