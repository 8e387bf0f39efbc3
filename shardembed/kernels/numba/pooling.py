"""The way back through pooling: gradients of bags to gradients of segments.

Legend: N entries (a segment in a bag), S segments, B bags, W columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.tools import compiled


@compiled
def spread(segments_N: Any, starts_B: Any, grads_BW: Any, grads_SW: Any) -> None:
    """Write the sum of the gradients of the bags that each segment is in, in the order of its entries.

    Args:
        starts_B: where each bag's entries begin; the last one ends with them.
        grads_SW: what to write; all of it is.
    """
    bags_N, ends_S = _by_segment(segments_N, starts_B, grads_SW.shape[0])
    _sum(bags_N, ends_S, grads_BW, grads_SW)


@compiled
def _by_segment(segments_N: Any, starts_B: Any, count: int) -> Any:
    """The bags of the entries, segment by segment and in each as they stood, and where each segment's end."""
    entries, bags = segments_N.size, starts_B.size
    ends_S = np.zeros(count, np.int64)
    for n in range(entries):
        ends_S[segments_N[n]] += 1
    before = 0
    for s in range(count):
        here = ends_S[s]
        ends_S[s] = before
        before += here
    bags_N = np.empty(entries, np.int64)
    for b in range(bags):
        for n in range(starts_B[b], starts_B[b + 1] if b + 1 < bags else entries):
            s = segments_N[n]
            bags_N[ends_S[s]] = b
            ends_S[s] += 1
    return bags_N, ends_S


@compiled
def _sum(bags_N: Any, ends_S: Any, grads_BW: Any, grads_SW: Any) -> None:
    width, zero, n = grads_SW.shape[1], grads_SW.dtype.type(0), 0
    for s in range(ends_S.size):
        if n == ends_S[s]:
            for j in range(width):
                grads_SW[s, j] = zero
            continue
        b = bags_N[n]  # read here: what the loop writes might be it, as far as the compiler knows
        for j in range(width):
            grads_SW[s, j] = zero + grads_BW[b, j]  # a sum that begins with -0 would be another
        n += 1
        while n < ends_S[s]:
            b = bags_N[n]
            for j in range(width):
                grads_SW[s, j] += grads_BW[b, j]
            n += 1
