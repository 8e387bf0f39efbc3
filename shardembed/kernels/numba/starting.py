"""Starting numbers of rows, element by element from a hash: what `kernels/starting.py` says, in two loops.

ids: uint64 `[N]`, the bits of the ids. base: uint64. out: float32, flat, W numbers an id.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.elements import load, store
from shardembed.kernels.numba.hashing import mixed_of
from shardembed.kernels.numba.tools import called, compiled

U64, F32 = np.uint64, np.float32
GAMMA = U64(0x9E3779B97F4A7C15)  # as in `kernels.mixing`
SIGN = U64(1 << 10)
IN_SEGMENT = 47  # as in `kernels.quantiles`
BELOW, FIRST, PART = (1 << IN_SEGMENT) - 1, 1023 << (52 - IN_SEGMENT), 2.0**-IN_SEGMENT
UNIT = F32(2.0**-24)


@called
def mix(x: Any) -> Any:
    """splitmix64's finalizer of a uint64."""
    return U64(mixed_of(np.int64(x)))


@compiled
def uniform(ids: Any, base: Any, first_column: int, scale: Any, offset: Any, out: Any) -> None:
    width = out.size // max(1, ids.size)
    for i in range(ids.size):
        row = mix(base ^ load(ids, i)) + U64(first_column) * GAMMA
        first = i * width
        for j in range(width):
            upper = mix(row + U64(j) * GAMMA) >> U64(40)
            store(out, first + j, F32(np.int32(upper)) * UNIT * scale + offset)


@compiled
def normal(ids: Any, base: Any, first_column: int, scale: Any, offset: Any, quantiles: Any, out: Any) -> None:
    """quantiles: of `quantile_table`, flat."""
    width = out.size // max(1, ids.size)
    signs_W, doubles_W = np.empty(width, np.float64), np.empty(width, np.float64)
    bits_W = doubles_W.view(np.int64)
    for i in range(ids.size):
        row = mix(base ^ load(ids, i)) + U64(first_column) * GAMMA
        for j in range(width):
            h = mix(row + U64(j) * GAMMA)
            store(doubles_W, j, np.float64(np.int64((h >> U64(11)) | U64(1))))
            store(signs_W, j, -1.0 if h & SIGN else 1.0)
        first = i * width
        for j in range(width):
            bits = load(bits_W, j)
            cubic = ((bits >> IN_SEGMENT) - FIRST) * 4
            t = np.float64(bits & BELOW) * PART
            size = (load(quantiles, cubic + 3) * t + load(quantiles, cubic + 2)) * t
            size = (size + load(quantiles, cubic + 1)) * t + load(quantiles, cubic)
            store(out, first + j, F32(size * load(signs_W, j)) * scale + offset)
