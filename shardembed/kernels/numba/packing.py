"""Messages are put together and taken apart by copying bytes, rank by rank and part by part.

addresses: where each part's tensor begins in memory, int64 `[P]`. items, counts: of each part and rank, how many its tensor has,
and how many of them travel, int64 `[P, R]`. item_bytes: int64 `[P]`. message: the address of the buffer.
"""

from __future__ import annotations

from typing import Any

from shardembed.kernels.numba.tools import compiled, copy_bytes
from shardembed.wire.message import ALIGNMENT


@compiled
def pack(addresses: Any, items: Any, counts: Any, item_bytes: Any, message: int) -> None:
    here = addresses.copy()
    for r in range(counts.shape[1]):
        for p in range(counts.shape[0]):
            size = counts[p, r] * item_bytes[p]
            copy_bytes(message, here[p], size)
            message += (size + ALIGNMENT - 1) & -ALIGNMENT
            here[p] += items[p, r] * item_bytes[p]


@compiled
def unpack(addresses: Any, items: Any, counts: Any, item_bytes: Any, message: int) -> None:
    here = addresses.copy()
    for r in range(counts.shape[1]):
        for p in range(counts.shape[0]):
            size = counts[p, r] * item_bytes[p]
            copy_bytes(here[p], message, size)
            message += (size + ALIGNMENT - 1) & -ALIGNMENT
            here[p] += items[p, r] * item_bytes[p]
