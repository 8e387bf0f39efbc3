"""The way back through pooling: gradients of bags to gradients of segments.

Legend: N entries (a segment in a bag), S segments, B bags, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.tools import compiled, fetch_row

AHEAD = 8  # rows


@compiled
def spread(segments_N: Any, starts_B: Any, grads_BW: Any, count: int, mean: bool) -> Any:
    """The sum of the gradients of the bags that each of `count` segments is in, `[S, W]`, in the order of its entries.

    Args:
        starts_B: where each bag's entries begin; the last one ends with them.
        mean: what a bag passes on is divided by its number of entries.
    """
    entries, bags, width = segments_N.size, starts_B.size, grads_BW.shape[1]
    if mean:
        whole_BW, grads_BW = grads_BW, np.empty_like(grads_BW)
        for b in range(bags):
            length = grads_BW.dtype.type(max(1, (starts_B[b + 1] if b + 1 < bags else entries) - starts_B[b]))
            for j in range(width):
                grads_BW[b, j] = whole_BW[b, j] / length
    ends_S = np.zeros(count, np.int64)
    for n in range(entries):
        ends_S[segments_N[n]] += 1
    before = 0
    for s in range(count):
        here = ends_S[s]
        ends_S[s] = before
        before += here
    bags_N = np.empty(entries, np.int64)  # segment by segment
    for b in range(bags):
        for n in range(starts_B[b], starts_B[b + 1] if b + 1 < bags else entries):
            s = segments_N[n]
            bags_N[ends_S[s]] = b
            ends_S[s] += 1
    flat, grads_SW = grads_BW.reshape(-1), np.empty((count, width), grads_BW.dtype)
    n = 0
    for s in range(count):
        found = grads_SW[s]
        found[:] = 0
        while n < ends_S[s]:
            if n + AHEAD < entries:
                fetch_row(flat, bags_N[n + AHEAD], width)
            row = grads_BW[bags_N[n]]
            for j in range(width):
                found[j] += row[j]
            n += 1
    return grads_SW
