"""XXH64 of many texts, one after the other, as `kernels/texts.py` says."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from shardembed.kernels.numba.elements import load, store
from shardembed.kernels.numba.tools import called, compiled

U64 = np.uint64
P1, P2, P3 = U64(0x9E3779B185EBCA87), U64(0xC2B2AE3D27D4EB4F), U64(0x165667B19E3779F9)
P4, P5 = U64(0x85EBCA77C2B2AE63), U64(0x27D4EB2F165667C5)


def _word_type(typing_context: Any, flat: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.gep(context.make_array(flat)(context, builder, arguments[0]).data, [arguments[1]])
        return builder.load(builder.bitcast(first, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(flat, types.int64), generate


# (flat bytes, index): the 8 bytes from there on, as the machine's uint64.
word: Any = intrinsic(_word_type)


@called
def _rotated(x: Any, by: int) -> Any:
    return (x << U64(by)) | (x >> U64(64 - by))


@called
def _round(total: Any, x: Any) -> Any:
    return _rotated(total + x * P2, 31) * P1


@called
def _joined(h: Any, total: Any) -> Any:
    return (h ^ _round(U64(0), total)) * P1 + P4


@compiled
def xxh64(data: Any, offsets: Any, seed: Any, out: Any) -> None:
    """data: uint8, flat; offsets: int64 `[n + 1]`; seed: uint64; out: uint64 `[n]`. For machines with little ends."""
    for i in range(out.size):
        at, end = load(offsets, i), load(offsets, i + 1)
        length = end - at
        if length >= 32:
            a, b, c, d = seed + P1 + P2, seed + P2, seed, seed - P1
            while end - at >= 32:
                a, b = _round(a, word(data, at)), _round(b, word(data, at + 8))
                c, d = _round(c, word(data, at + 16)), _round(d, word(data, at + 24))
                at += 32
            h = _rotated(a, 1) + _rotated(b, 7) + _rotated(c, 12) + _rotated(d, 18)
            h = _joined(_joined(_joined(_joined(h, a), b), c), d)
        else:
            h = seed + P5
        h += U64(length)
        while end - at >= 8:
            h = _rotated(h ^ _round(U64(0), word(data, at)), 27) * P1 + P4
            at += 8
        if end - at >= 4:
            half = U64(load(data, at)) | U64(load(data, at + 1)) << U64(8)
            half |= U64(load(data, at + 2)) << U64(16) | U64(load(data, at + 3)) << U64(24)
            h = _rotated(h ^ half * P1, 23) * P2 + P3
            at += 4
        while at < end:
            h = _rotated(h ^ U64(load(data, at)) * P5, 11) * P1
            at += 1
        h = (h ^ h >> U64(33)) * P2
        h = (h ^ h >> U64(29)) * P3
        store(out, i, h ^ h >> U64(32))
