"""XXH64: the published values, and the published description, by both ways."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels import grouping
from shardembed.kernels.texts import Texts, xxh64

MASK = (1 << 64) - 1
P1, P2, P3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P4, P5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
PRIME32, PRIME64 = 2654435761, 11400714785074694797
# Of the self-test of xxHash's own command line: the length of its buffer, the seed, the hash.
PUBLISHED = [
    (0, 0, 0xEF46DB3751D8E999),
    (0, PRIME32, 0xAC75FDA2929B17EF),
    (1, 0, 0xE934A84ADB052768),
    (1, PRIME32, 0x5014607643A9B4C3),
    (4, 0, 0x9136A0DCA57457EE),
    (14, 0, 0x8282DCC4994E35C8),
    (14, PRIME32, 0xC3BD6BF63DEB6DF0),
    (222, 0, 0xB641AE8CB691C174),
    (222, PRIME32, 0x20CB8AB7AE10C14A),
]


def rotated(x: int, by: int) -> int:
    return (x << by | x >> 64 - by) & MASK


def mixed_in(total: int, word: int) -> int:
    return rotated(total + word * P2 & MASK, 31) * P1 & MASK


def slow(text: bytes, seed: int) -> int:
    """One text, from the description."""
    h, at = seed + P5, 0
    if len(text) >= 32:
        totals = [seed + P1 + P2, seed + P2, seed, seed - P1]
        while len(text) - at >= 32:
            words = [int.from_bytes(text[at + 8 * i : at + 8 * i + 8], "little") for i in range(4)]
            totals = [mixed_in(total, word) for total, word in zip(totals, words, strict=True)]
            at += 32
        h = sum(rotated(total, by) for total, by in zip(totals, (1, 7, 12, 18), strict=True))
        for total in totals:
            h = ((h ^ mixed_in(0, total)) * P1 + P4) & MASK
    h = h + len(text) & MASK
    while len(text) - at >= 8:
        h = rotated(h ^ mixed_in(0, int.from_bytes(text[at : at + 8], "little")), 27) * P1 + P4 & MASK
        at += 8
    if len(text) - at >= 4:
        h = rotated(h ^ int.from_bytes(text[at : at + 4], "little") * P1 & MASK, 23) * P2 + P3 & MASK
        at += 4
    for byte in text[at:]:
        h = rotated(h ^ byte * P5 & MASK, 11) * P1 & MASK
    h = (h ^ h >> 33) * P2 & MASK
    h = (h ^ h >> 29) * P3 & MASK
    return h ^ h >> 32


def buffer(length: int) -> bytes:
    """xxHash's own."""
    found, state = bytearray(), PRIME32
    for _ in range(length):
        found.append(state >> 56)
        state = state * PRIME64 & MASK
    return bytes(found)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(grouping, "missing", lambda: "numba is not installed")


@pytest.mark.usefixtures("way")
def test_published_values() -> None:
    for length, seed, expected in PUBLISHED:
        assert slow(buffer(length), seed) == expected
        assert xxh64(Texts.of([buffer(length)]), seed).tolist() == [expected]


@pytest.mark.usefixtures("way")
def test_every_length_beside_every_other() -> None:
    texts = [np.random.default_rng(length).bytes(length) for length in range(100)]
    texts += [*texts[::-1], b"\xff" * 1000]
    for seed in (0, MASK):
        assert xxh64(Texts.of(texts), seed).tolist() == [slow(text, seed) for text in texts]


@given(st.lists(st.binary(max_size=80)), st.integers(0, MASK), st.binary(max_size=3), st.booleans())
def test_texts_in_the_middle_of_others(texts: list[bytes], seed: int, before: bytes, is_plain: bool) -> None:
    whole = Texts.of([before, *texts, b"behind"])
    with pytest.MonkeyPatch.context() as patch:
        if is_plain:
            patch.setattr(grouping, "missing", lambda: "numba is not installed")
        found = xxh64(Texts(whole.data, whole.offsets[1:-1]), seed)
    assert found.tolist() == [slow(text, seed) for text in texts]
