"""What this machine allows, measured in the run whose figures are held against it: reading rows at random, copying, exchanging.

All ranks measure at once, since they share memory and cores in a step too. A figure is the fastest of several tries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import shardembed as se
from shardembed.kernels.numba.elements import fetch_each
from shardembed.kernels.numba.tools import compiled
from shardembed.planner.calibrate.stages import barrier, gathered

COPIED = 64 << 20  # bytes of a copy: beyond the caches
GATHERED = 128 << 20  # bytes of the table that rows are gathered from
TRIES = 5
AHEAD = 16  # rows that the gather asks for before it needs them


@dataclass(frozen=True)
class Limits:
    """copy: bytes read and written a second. gather: random rows of the given width a second, from a table beyond the caches.
    empty: seconds of an all-to-all without content.
    """

    copy: float
    gather: float
    width: int
    empty: float


def measure(width: int) -> Limits:
    """Collective."""
    rows = max(1024, GATHERED // (4 * width))
    table = torch.ones(rows, width)
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, rows, 1 << 15))
    return Limits(copy_bandwidth(), len(keys) / gather_seconds(table, keys), width, exchange_seconds(0))


def fastest(action: Callable[[], object], tries: int = TRIES) -> float:
    """Seconds on the slowest rank, in the fastest try. Collective."""
    taken = []
    for _ in range(tries + 1):  # the first warms up
        barrier()
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return float(np.max(gathered(np.array(taken[1:])), 0).min())


def copy_bandwidth() -> float:
    """Bytes a second, those read and those written."""
    source = torch.ones(COPIED // 4)
    target = torch.empty_like(source)
    return 2 * COPIED / fastest(lambda: target.copy_(source))


def gather_seconds(weights: torch.Tensor, keys: torch.Tensor, offsets: torch.Tensor | None = None) -> float:
    """Of reading these rows, and writing them side by side, or their sums from offset to offset: torch's way, or with
    prefetching. Collective.
    """
    many = len(keys) if offsets is None else len(offsets) - 1
    out = torch.empty(many, weights.shape[1], dtype=weights.dtype)
    if offsets is None:
        found = fastest(lambda: torch.index_select(weights, 0, keys, out=out))
    else:
        found = fastest(lambda: F.embedding_bag(keys, weights, offsets, mode="sum", include_last_offset=True))
    if weights.dtype != torch.float32:
        return found
    starts = torch.arange(many + 1) if offsets is None else offsets
    arrays = weights.view(-1).numpy(), keys.numpy(), starts.numpy(), out.numpy()
    return min(found, fastest(lambda: _gather(*arrays)))


def exchange_seconds(size: int) -> float:
    """Of an all-to-all in which each rank sends `size` bytes to every other; 0.0 where there is no other. Collective."""
    ranks = se.world_size()
    if ranks == 1:
        return 0.0
    send = torch.zeros(max(1, size) * ranks, dtype=torch.uint8)
    received = torch.empty_like(send)
    return fastest(lambda: dist.all_to_all_single(received, send), 2 * TRIES)


@compiled
def _gather(flat: Any, keys: Any, starts: Any, out: Any) -> None:
    """The sum of the rows of each segment, each row asked for some rows before it is read."""
    width = out.shape[1]
    for segment in range(len(starts) - 1):
        for i in range(starts[segment], starts[segment + 1]):
            if i + AHEAD < len(keys):
                fetch_each((flat,), keys[i + AHEAD] * width, width)
            first = keys[i] * width
            if i == starts[segment]:
                for j in range(width):
                    out[segment, j] = flat[first + j]
            else:
                for j in range(width):
                    out[segment, j] += flat[first + j]
