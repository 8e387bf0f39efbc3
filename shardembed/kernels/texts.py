"""XXH64 of whole columns of texts (Collet, "xxHash fast digest algorithm", doc/xxhash_spec.md of the xxHash project): a published
hash, which databases and other languages have too. Compiled where Numba is installed, else NumPy's, text by text at once.

Legend: N texts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.kernels.grouping import compiled

U64 = np.uint64
P1, P2, P3 = U64(0x9E3779B185EBCA87), U64(0xC2B2AE3D27D4EB4F), U64(0x165667B19E3779F9)
P4, P5 = U64(0x85EBCA77C2B2AE63), U64(0x27D4EB2F165667C5)
STRIPE = 32  # bytes, four words


@dataclass(frozen=True)
class Texts:
    """Texts one behind the other.

    Attributes:
        data: their bytes, uint8, flat; there may be more.
        offsets: where each begins, and the last one ends, int64 `[N + 1]`, ascending.
    """

    data: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> bytes:
        return self.data[self.offsets[number] : self.offsets[number + 1]].tobytes()

    @staticmethod
    def of(texts: list[bytes]) -> Texts:
        return Texts.joined(b"".join(texts), np.fromiter(map(len, texts), np.int64, len(texts)))

    @staticmethod
    def joined(data: bytes, lengths_N: NDArray[np.int64]) -> Texts:
        return Texts(np.frombuffer(data, np.uint8), np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int64))


def xxh64(texts: Texts, seed: int = 0) -> NDArray[np.uint64]:
    """The hash of each, uint64 `[N]`."""
    kernels = compiled(torch.device("cpu"))
    if kernels is None or sys.byteorder != "little":
        with np.errstate(over="ignore"):
            return plain(texts, seed)
    out = np.empty(len(texts), U64)
    kernels.texts.xxh64(np.ascontiguousarray(texts.data), np.ascontiguousarray(texts.offsets), U64(seed), out)
    return out


def plain(texts: Texts, seed: int) -> NDArray[np.uint64]:
    """The same by NumPy: of all texts that still have so many bytes, the next ones at once."""
    at_N, ends_N = texts.offsets[:-1].copy(), texts.offsets[1:]
    lengths_N, start = ends_N - at_N, U64(seed)
    # Behind the last byte there are more, for windows that begin near it.
    bytes_ = np.lib.stride_tricks.sliding_window_view(np.concatenate([texts.data, np.zeros(8, np.uint8)]), 8)

    def words(where: NDArray[np.int64]) -> NDArray[np.uint64]:
        return np.ascontiguousarray(bytes_[where]).view("<u8").reshape(-1).astype(U64)

    totals = [np.full(len(texts), first, U64) for first in (start + P1 + P2, start + P2, start, start - P1)]
    while len(some := np.flatnonzero(ends_N - at_N >= STRIPE)):
        for number, total in enumerate(totals):
            total[some] = _round(total[some], words(at_N[some] + 8 * number))
        at_N[some] += STRIPE
    a, b, c, d = totals
    h = _rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)
    for total in totals:
        h = (h ^ _round(U64(0), total)) * P1 + P4
    h = np.where(lengths_N >= STRIPE, h, start + P5) + lengths_N.astype(U64)
    while len(some := np.flatnonzero(ends_N - at_N >= 8)):
        h[some] = _rotated(h[some] ^ _round(U64(0), words(at_N[some])), 27) * P1 + P4
        at_N[some] += 8
    some = np.flatnonzero(ends_N - at_N >= 4)
    h[some] = _rotated(h[some] ^ (words(at_N[some]) & U64(0xFFFFFFFF)) * P1, 23) * P2 + P3
    at_N[some] += 4
    while len(some := np.flatnonzero(ends_N > at_N)):
        h[some] = _rotated(h[some] ^ (words(at_N[some]) & U64(0xFF)) * P5, 11) * P1
        at_N[some] += 1
    h = (h ^ (h >> U64(33))) * P2
    h = (h ^ (h >> U64(29))) * P3
    return h ^ (h >> U64(32))


def _rotated(x: NDArray[np.uint64], by: int) -> NDArray[np.uint64]:
    return (x << U64(by)) | (x >> U64(64 - by))


def _round(total: NDArray[np.uint64] | np.uint64, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _rotated(total + x * P2, 31) * P1
