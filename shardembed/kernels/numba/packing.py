"""Messages are put together and taken apart by copying bytes, rank by rank and part by part.

addresses: where each part's tensor begins in memory, int64 `[P]`. items, counts: of each part and rank, how many its tensor has,
and how many of them travel, int64 `[P, R]`. item_bytes: int64 `[P]`. message: the address of the buffer.
"""

from __future__ import annotations

from typing import Any

from shardembed.kernels.numba.tools import called, compiled, copy_bytes, fetch_bytes, number_at
from shardembed.wire.message import ALIGNMENT

NUMBER_BYTES = 8
AHEAD = 16 * NUMBER_BYTES


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
def gather(addresses: Any, items: Any, counts: Any, item_bytes: Any, rows: Any, ends: Any, limits: Any, message: int) -> bool:
    """As `pack`, where some parts are rows of a matrix; false where one of them has no such row.

    Args:
        addresses: of a matrix, where `rows` says which of its rows a part consists of.
        rows, ends: where the numbers of these (int64) begin and end in memory, `[P]`; 0 for a part that is a tensor.
        limits: rows of the matrix.
    """
    here, next_rows = addresses.copy(), rows.copy()
    for p in range(rows.size):  # rows lie anywhere, so each is asked for before its turn
        for at in range(rows[p], min(ends[p], rows[p] + AHEAD), NUMBER_BYTES):
            fetch_bytes(addresses[p] + number_at(at) * item_bytes[p], item_bytes[p])
    for r in range(counts.shape[1]):
        for p in range(counts.shape[0]):
            size = counts[p, r] * item_bytes[p]
            if rows[p] == 0:
                copy_bytes(message, here[p], size)
                here[p] += items[p, r] * item_bytes[p]
            else:
                some = next_rows[p], counts[p, r], ends[p]
                if not _gather_rows(addresses[p], item_bytes[p], limits[p], some, message):
                    return False
                next_rows[p] += items[p, r] * NUMBER_BYTES
            message += (size + ALIGNMENT - 1) & -ALIGNMENT
    return True


@called
def _gather_rows(matrix: int, row_bytes: int, limit: int, some: Any, message: int) -> bool:
    """some: where the numbers of these rows begin, how many they are, and where those of the part end."""
    first, count, end = some
    for at in range(first, first + count * NUMBER_BYTES, NUMBER_BYTES):
        if at + AHEAD < end:
            fetch_bytes(matrix + number_at(at + AHEAD) * row_bytes, row_bytes)
        row = number_at(at)
        if row < 0 or row >= limit:
            return False
        copy_bytes(message, matrix + row * row_bytes, row_bytes)
        message += row_bytes
    return True


@compiled
def unpack(addresses: Any, items: Any, counts: Any, item_bytes: Any, message: int) -> None:
    here = addresses.copy()
    for r in range(counts.shape[1]):
        for p in range(counts.shape[0]):
            size = counts[p, r] * item_bytes[p]
            copy_bytes(here[p], message, size)
            message += (size + ALIGNMENT - 1) & -ALIGNMENT
            here[p] += items[p, r] * item_bytes[p]
