"""Hash tables over int64 ids on a device: words as in `kernels/numba/hashing.py`, entered by an atomic maximum.

Of two entries that want a place the larger word gets it, whoever comes first, and the other goes on, so races leave no trace in a
table that is built at once (Shun and Blelloch, "Phase-concurrent hash tables for determinism", SPAA 2014). Nor do they ever in what
is found: ids are distinct, their slots are the caller's, and a search goes on until it meets an empty word. Gaps are not closed,
since others may be searching there: an entry that is taken out leaves `GONE` behind, until another takes its place or the table is
built anew. Nothing here waits for the device.

Legend: E keys, U slots, S slots that there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from shardembed.kernels.mixing import Secret
from shardembed.kernels.triton.mixing import shifted, tag_of
from shardembed.kernels.triton.tiles import launch

# One warp: a loop that ends when all searches of a program have then needs no barrier.
BLOCK, WARPS = 128, 1
EMPTY, GONE = tl.constexpr(-1), tl.constexpr(-2)  # below every entry
TAG = tl.constexpr(0xFFFFFFFF)


def find(words: torch.Tensor, keys_E: torch.Tensor, ids_S: torch.Tensor, secret: Secret) -> torch.Tensor:
    """The number whose id each key is, or -1. The words must have one that is empty."""
    slots_E = torch.empty_like(keys_E)
    if keys_E.numel():
        _launch(_find_slots, keys_E.numel(), slots_E, words, keys_E, ids_S, keys_E.numel(), words.numel(), *secret)
    return slots_E


def insert(words: torch.Tensor, slots_U: torch.Tensor, ids_S: torch.Tensor, secret: Secret) -> None:
    """Add these slots, whose ids are distinct and absent. There must be room for them, and for a word that stays empty."""
    _launch(_insert_slots, slots_U.numel(), words, slots_U, ids_S, slots_U.numel(), words.numel(), *secret)


def erase(words: torch.Tensor, slots_U: torch.Tensor, ids_S: torch.Tensor, secret: Secret) -> None:
    """Take these slots out."""
    _launch(_erase_slots, slots_U.numel(), words, slots_U, ids_S, slots_U.numel(), words.numel(), *secret)


def move(words: torch.Tensor, others: torch.Tensor) -> None:
    """All entries into another table, which is empty and has room for them."""
    _launch(_rebuild, words.numel(), others, words, words.numel(), others.numel())


def _launch(kernel: Any, count: int, *arguments: Any) -> None:
    launch(kernel, -(-count // BLOCK), *arguments, BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def _home(tag, size):
    """Where the search for a tag begins."""
    return shifted(tag * size, 32)


@triton.jit
def _after(place, size):
    return tl.where(place + 1 < size, place + 1, 0)


@triton.jit(do_not_specialize=["count", "size", "flip", "factor_1", "factor_2"])
def _find_slots(slots_E, words, keys_E, ids_S, count, size, flip, factor_1, factor_2, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = entry < count
    key = tl.load(keys_E + entry, mask=there, other=0)
    tag = tag_of(key, flip, factor_1, factor_2)
    place = _home(tag, size)
    found = tl.full([BLOCK], -1, tl.int64)
    looks = there
    while tl.max(looks.to(tl.int32), 0) > 0:
        word = tl.load(words + place, mask=looks, other=EMPTY)
        alike = looks & (word >= 0) & ((word & TAG) == tag)
        slot = word >> 32
        same = alike & (tl.load(ids_S + slot, mask=alike, other=0) == key)
        found = tl.where(same, slot, found)
        looks = looks & (word != EMPTY) & ~same
        place = _after(place, size)
    tl.store(slots_E + entry, found, mask=there)


@triton.jit
def _enter(words, word, waits, size):
    """Each word that `waits` into the table, from its home on. Of two that meet the larger stays, and the other goes on."""
    place = _home(word & TAG, size)
    while tl.max(waits.to(tl.int32), 0) > 0:
        met = tl.atomic_max(words + place, word, mask=waits, sem="relaxed")
        waits = waits & (met >= 0)
        word = tl.minimum(met, word)
        place = _after(place, size)


@triton.jit
def _word(slot, ids_S, live, flip, factor_1, factor_2):
    return (slot << 32) | tag_of(tl.load(ids_S + slot, mask=live, other=0), flip, factor_1, factor_2)


@triton.jit(do_not_specialize=["count", "size", "flip", "factor_1", "factor_2"])
def _insert_slots(words, slots_U, ids_S, count, size, flip, factor_1, factor_2, BLOCK: tl.constexpr):
    u = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = u < count
    slot = tl.load(slots_U + u, mask=live, other=0)
    _enter(words, _word(slot, ids_S, live, flip, factor_1, factor_2), live, size)


@triton.jit(do_not_specialize=["count", "size", "flip", "factor_1", "factor_2"])
def _erase_slots(words, slots_U, ids_S, count, size, flip, factor_1, factor_2, BLOCK: tl.constexpr):
    u = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = u < count
    slot = tl.load(slots_U + u, mask=live, other=0)
    wanted = _word(slot, ids_S, live, flip, factor_1, factor_2)
    place = _home(wanted & TAG, size)
    target = tl.full([BLOCK], -1, tl.int64)
    looks = live
    while tl.max(looks.to(tl.int32), 0) > 0:
        word = tl.load(words + place, mask=looks, other=EMPTY)
        same = looks & (word == wanted)
        target = tl.where(same, place, target)
        looks = looks & (word != EMPTY) & ~same
        place = _after(place, size)
    tl.debug_barrier()
    tl.store(words + target, tl.full([BLOCK], GONE, tl.int64), mask=target >= 0)


@triton.jit(do_not_specialize=["count", "size"])
def _rebuild(others, words, count, size, BLOCK: tl.constexpr):
    old = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + old, mask=old < count, other=EMPTY)
    _enter(others, word, word >= 0, size)
