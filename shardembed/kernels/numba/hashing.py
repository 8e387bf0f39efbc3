"""Hash tables over int64 ids: linear probing, no id reserved.

A table is an array of words. A word that is not negative is an entry: a number (the slot of an id, say) above the id's tag, 32 bits
of a hash that a secret chooses (`mixing.Secret`). The ids themselves lie with the caller, by number, and are read where tags agree.
An entry's home is its tag, scaled down to the table's size, whatever that is: so tables grow and close their gaps without a look at
ids, and a table is in the order of its tags, so growing goes through memory once. Part of the words must always be empty (-1).

Legend: E keys, U slots, S slots that there are, N ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.elements import fetch, load, store
from shardembed.kernels.numba.tools import called, compiled

MIX_1, MIX_2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)  # as in `kernels.mixing`
EMPTY = -1
TAG = 0xFFFFFFFF  # the bits of a word that are the tag
AHEAD = 16  # entries between asking for what lies in memory and reading it
RING = 64  # the latest tags; a power of two above 2 * AHEAD
LEAST_KEPT, MOST_KEPT = 64, 1 << 16  # keys that a search remembers
BLOCK = 512  # keys that are searched together


@called
def shifted(x: int, bits: int) -> int:
    """A logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


@called
def mixed_of(number: int) -> int:
    """As `mixing.mixed`, of one id."""
    number = (number ^ shifted(number, 30)) * MIX_1
    number = (number ^ shifted(number, 27)) * MIX_2
    return number ^ shifted(number, 31)


@called
def bucket_of(number: int, buckets: int) -> int:
    """As `mixing.buckets_of`, of one id."""
    return shifted(shifted(mixed_of(number), 32) * buckets, 32)


@called
def tag_of(number: int, flip: int, factor_1: int, factor_2: int) -> int:
    """As `mixing.tags_of`, of one id."""
    number = (number ^ flip) * factor_1
    number = (number ^ shifted(number, 32)) * factor_2
    return shifted((number ^ shifted(number, 32)) * MIX_2, 32)


@called
def home_of(tag: int, size: int) -> int:
    """Where the search for a tag begins in a table of `size` words, at most 2^32."""
    return shifted(tag * size, 32)


@called
def after(place: int, size: int) -> int:
    return place + 1 if place + 1 < size else 0


@compiled
def buckets_of(ids_N: Any, buckets: int) -> Any:
    """As `mixing.buckets_of`."""
    buckets_N = np.empty(ids_N.size, np.int64)
    for n in range(ids_N.size):
        store(buckets_N, n, bucket_of(load(ids_N, n), buckets))
    return buckets_N


@called
def kept_for(count: int) -> int:
    """How many of the latest keys are remembered: a power of two, so many that they fit a core's own cache."""
    kept = LEAST_KEPT
    while kept < count and kept < MOST_KEPT:
        kept *= 2
    return kept


@compiled
def find(words: Any, keys_E: Any, ids_S: Any, secret: Any, slots_E: Any) -> None:
    """Into `slots_E`: the number whose id each key is, or -1. The words must have one that is empty.

    A key that was met a while ago is not searched again: ids repeat, and the table lies in slower memory than what remembers them.
    """
    flip, factor_1, factor_2 = secret
    size, count = words.size, keys_E.size
    kept = kept_for(count)
    latest = np.zeros(kept, np.int32)  # by the lower bits of a tag, which say nothing of its home: which key was met last
    keys_U, tags_U, slots_U = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.int64)
    distinct, done = 0, 0
    for first in range(0, count, BLOCK):
        for e in range(first, min(first + BLOCK, count)):  # without a branch, since nobody foresees which ids repeat
            key = load(keys_E, e)
            tag = tag_of(key, flip, factor_1, factor_2)
            fetch(words, home_of(tag, size))
            known = np.int64(load(latest, tag & (kept - 1)))
            met = (known < distinct) & (load(keys_U, known) == key)
            number = known if met else distinct
            store(keys_U, distinct, key)
            store(tags_U, distinct, tag)
            store(latest, tag & (kept - 1), np.int32(number))
            store(slots_E, e, number)
            distinct += not met
        for u in range(done, distinct):
            tag = load(tags_U, u)
            word = load(words, home_of(tag, size))
            likely = word if (word >= 0) & (word & TAG == tag) else 0
            fetch(ids_S, likely >> 32)
        for u in range(done, distinct):
            key, tag, found = load(keys_U, u), load(tags_U, u), EMPTY
            place = home_of(tag, size)
            word = load(words, place)
            while word >= 0:
                if word & TAG == tag and load(ids_S, word >> 32) == key:
                    found = word >> 32
                    break
                place = after(place, size)
                word = load(words, place)
            store(slots_U, u, found)
        done = distinct
    for e in range(count):
        store(slots_E, e, load(slots_U, load(slots_E, e)))


@compiled
def insert(words: Any, slots_U: Any, ids_S: Any, secret: Any) -> None:
    """Add these slots, whose ids are distinct and absent. There must be room for them, and for a word that stays empty."""
    flip, factor_1, factor_2 = secret
    size, count = words.size, slots_U.size
    tags = np.empty(RING, np.int64)
    for step in range(count + 2 * AHEAD):
        if step < count:
            fetch(ids_S, load(slots_U, step))
        u = step - AHEAD
        if 0 <= u < count:
            tag = tag_of(load(ids_S, load(slots_U, u)), flip, factor_1, factor_2)
            store(tags, u & (RING - 1), tag)
            fetch(words, home_of(tag, size))
        u = step - 2 * AHEAD
        if u < 0:
            continue
        tag = load(tags, u & (RING - 1))
        place = home_of(tag, size)
        while load(words, place) >= 0:
            place = after(place, size)
        store(words, place, (load(slots_U, u) << 32) | tag)


@compiled
def erase(words: Any, slots_U: Any, ids_S: Any, secret: Any) -> int:
    """Take these slots out, and close the gaps: no entry is left behind a word that is empty. Returns how many there were before
    the first that the table does not have, where it stops.
    """
    flip, factor_1, factor_2 = secret
    size, count = words.size, slots_U.size
    tags = np.empty(RING, np.int64)
    for step in range(count + 2 * AHEAD):
        if step < count:
            fetch(ids_S, load(slots_U, step))
        u = step - AHEAD
        if 0 <= u < count:
            tag = tag_of(load(ids_S, load(slots_U, u)), flip, factor_1, factor_2)
            store(tags, u & (RING - 1), tag)
            fetch(words, home_of(tag, size))
        u = step - 2 * AHEAD
        if u < 0:
            continue
        tag = load(tags, u & (RING - 1))
        wanted = (load(slots_U, u) << 32) | tag
        gap = home_of(tag, size)
        while load(words, gap) != wanted:
            if load(words, gap) < 0:
                return u
            gap = after(gap, size)
        place = after(gap, size)
        word = load(words, place)
        while word >= 0:
            # An entry may move back as far as its home; distances are counted around the end.
            way, back = place - home_of(word & TAG, size), place - gap
            if (way if way >= 0 else way + size) >= (back if back >= 0 else back + size):
                store(words, gap, word)
                gap = place
            place = after(place, size)
            word = load(words, place)
        store(words, gap, EMPTY)
    return count


@compiled
def move(words: Any, larger: Any) -> None:
    """All entries into another table, which is empty and has room for them."""
    size = larger.size
    for old in range(words.size):
        word = load(words, old)
        if word >= 0:
            place = home_of(word & TAG, size)
            while load(larger, place) >= 0:
                place = after(place, size)
            store(larger, place, word)


@compiled
def intern(words: Any, ids_N: Any, first: Any, secret: Any) -> Any:
    """Number the distinct ids in the order in which they are first met.

    Args:
        words: an empty table with room for all of `first` and `ids_N`, and for a word that stays empty.
        first: one id, which gets number 0, or none.

    Returns:
        (the distinct ids `[U]`, the number of each id `[N]`, how often each occurs among `ids_N` `[U]`).
    """
    flip, factor_1, factor_2 = secret
    size, count, distinct = words.size, ids_N.size, first.size
    ids_U, counts_U = np.empty(count + distinct, np.int64), np.empty(count + distinct, np.int64)
    for u in range(distinct):
        tag = tag_of(first[u], flip, factor_1, factor_2)
        ids_U[u], counts_U[u], words[home_of(tag, size)] = first[u], 0, (u << 32) | tag
    numbers_N, tags = np.empty(count, np.int64), np.empty(RING, np.int64)
    for step in range(count + AHEAD):
        if step < count:
            tag = tag_of(load(ids_N, step), flip, factor_1, factor_2)
            store(tags, step & (RING - 1), tag)
            fetch(words, home_of(tag, size))
        n = step - AHEAD
        if n < 0:
            continue
        number, tag, found = load(ids_N, n), load(tags, n & (RING - 1)), distinct
        place = home_of(tag, size)
        word = load(words, place)
        while word >= 0:
            if word & TAG == tag and load(ids_U, word >> 32) == number:
                found = word >> 32
                break
            place = after(place, size)
            word = load(words, place)
        if found == distinct:
            store(words, place, (distinct << 32) | tag)
            store(ids_U, distinct, number)
            store(counts_U, distinct, 0)
            distinct += 1
        store(counts_U, found, load(counts_U, found) + 1)
        store(numbers_N, n, found)
    return ids_U[:distinct].copy(), numbers_N, counts_U[:distinct].copy()
