"""How much one program works on, and the loop that all kernels share: vectors gathered and summed, in order."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from shardembed.kernels.triton.numbers import widen

ELEMENTS = 512  # a tile: several rows where they are narrow
ELEMENTS_A_WARP = 256  # 32 threads, two loads of 16 bytes each in float32
AHEAD = 4  # loads under way at a time, for each row of a tile
WAVES = 16  # programs a multiprocessor, in kernels whose number of rows only the device knows


@dataclass(frozen=True)
class Tile:
    """The vectors that one program takes at a time.

    Attributes:
        columns: elements of a vector, a power of two that holds the width.
        many: vectors of a tile.
        warps: of the program that works on it.
    """

    columns: int
    many: int
    warps: int

    @property
    def constants(self) -> dict[str, int]:
        """As kernels take them."""
        return {"COLUMNS": self.columns, "MANY": self.many, "AHEAD": AHEAD, "num_warps": self.warps}

    @staticmethod
    def of(width: int) -> "Tile":
        columns = 1 << (width - 1).bit_length()
        many = max(1, ELEMENTS // columns)
        return Tile(columns, many, max(1, min(16, columns * many // ELEMENTS_A_WARP)))

    def programs(self, vectors: int) -> int:
        """One for each tile."""
        return -(-vectors // self.many)

    def lasting_programs(self, at_most: int, device: torch.device) -> int:
        """Programs that share up to `at_most` vectors, tile after tile: no more than the device can use."""
        return max(1, min(self.programs(at_most), processors(device) * WAVES))


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, a tensor."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(programs,)](*arguments, **constants)


@triton.jit
def add_vectors(
    total,
    table,
    index_E,
    scales_E,
    first,
    count,
    wanted,
    WIDTH: tl.constexpr,
    INDEXED: tl.constexpr,
    SCALED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """`total` `[MANY, COLUMNS]` plus `count` vectors of `table` for each of its rows, one after the other.

    The i-th is table[index_E[first + i]], or table[first + i] where not INDEXED; times scales_E[first + i] where SCALED.
    wanted: which columns there are.
    """
    columns = tl.arange(0, total.shape[1])
    for begin in range(0, tl.max(count, 0), AHEAD):
        # Unrolled, so that the loads are under way together; the additions keep their order.
        for ahead in tl.static_range(AHEAD):
            here = begin + ahead < count
            entry = first + (begin + ahead)
            row = entry
            if INDEXED:
                row = tl.load(index_E + entry, mask=here, other=0).to(tl.int64)
            at = row[:, None] * WIDTH + columns[None, :]
            vector = widen(tl.load(table + at, mask=here[:, None] & wanted[None, :], other=0.0), total.dtype)
            if SCALED:
                vector *= widen(tl.load(scales_E + entry, mask=here, other=0.0), total.dtype)[:, None]
            total += vector
    return total
