"""The numbers that rows of dynamic tables start from. Element c of a row is a hash of (table, id, c) made into a number, so it does
not depend on who asks, for how many ids, or for which columns.

    base       mix(table ^ STARTING)                 mix: splitmix64's finalizer; table: the hash of seed and name
    element    h = mix(mix(base ^ id) + c * GAMMA)   64 bits
    uniform    x = (the upper 24 bits of h) / 2^24
    normal     |x| from the upper 52 bits of h (`quantiles.py`), in float64, rounded to float32; its sign is bit 10
    number     scale * x + offset, in float32, each of the two rounded

On a CPU compiled where Numba is installed, on a GPU where Triton is; elsewhere plain torch. All give the same bits. For that a
product and a sum may never become one fused operation: torch computes one after the other, LLVM fuses only what is marked for it
(fastmath, which `kernels/numba/tools.py` leaves out), and Triton is told not to.

Legend: N ids, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from shardembed.kernels import quantiles, triton
from shardembed.kernels.grouping import compiled
from shardembed.kernels.mixing import GAMMA, mixed, shifted
from shardembed.kernels.quantiles import quantile_table

STARTING = 0x676E697472617473  # keeps these hashes apart from those of stochastic rounding
PIECE = 1 << 15  # numbers that plain torch draws at a time, in the cache


@dataclass(frozen=True)
class Distribution:
    """Of the numbers of one table.

    Attributes:
        table: the hash of its seed and name, a signed 64-bit integer.
        normal: of x: the normal distribution (mean 0, std 1), else the uniform one over [0, 1).
        scale: of x, as float32 holds it.
        offset: the same, what is added.
    """

    table: int
    normal: bool
    scale: float
    offset: float

    @property
    def base(self) -> int:
        """What all hashes of the table begin with, signed."""
        return _base(self.table)


@cache  # asked for in every step that meets new ids
def _base(table: int) -> int:
    return int(mixed(torch.tensor(table ^ STARTING)))


def draw(out_NW: torch.Tensor, ids_N: torch.Tensor, first_column: int, numbers: Distribution) -> None:
    """Write the numbers of columns first_column, first_column + 1, ... of these ids into `out_NW`, float32 and contiguous."""
    if (kernels := compiled(out_NW.device)) is not None:
        ids, out = ids_N.contiguous().numpy().view(np.uint64), out_NW.detach().numpy().reshape(-1)
        base, scale, offset = np.uint64(numbers.base % (1 << 64)), np.float32(numbers.scale), np.float32(numbers.offset)
        if numbers.normal:
            kernels.starting.normal(ids, base, first_column, scale, offset, quantile_table().reshape(-1), out)
        else:
            kernels.starting.uniform(ids, base, first_column, scale, offset, out)
    elif triton.serves(out_NW.device):
        from shardembed.kernels.triton.starting import draw as draw_there

        draw_there(out_NW, ids_N.contiguous(), first_column, numbers)
    else:
        rows = max(1, PIECE // max(1, out_NW.shape[1]))
        for out, ids in zip(out_NW.split(rows), ids_N.split(rows), strict=True):
            out.copy_(plain(ids, range(first_column, first_column + out.shape[1]), numbers))


def plain(ids_N: torch.Tensor, columns: range, numbers: Distribution) -> torch.Tensor:
    """The same in plain torch: float32 `[N, W]`."""
    columns_W = torch.arange(columns.start, columns.stop, device=ids_N.device)
    hashes_NW = mixed(mixed(ids_N ^ numbers.base).unsqueeze(1) + columns_W * GAMMA)
    x = _normal(hashes_NW) if numbers.normal else shifted(hashes_NW, 40).to(torch.float32) * 2.0**-24
    return x * numbers.scale + numbers.offset


def _normal(hashes: torch.Tensor) -> torch.Tensor:
    bits = (shifted(hashes, 11) | 1).to(torch.float64).view(torch.int64)
    cubics = quantiles.on_device(hashes.device)[(bits >> quantiles.IN_SEGMENT) - quantiles.FIRST]
    t = (bits & ((1 << quantiles.IN_SEGMENT) - 1)).to(torch.float64) * 2.0**-quantiles.IN_SEGMENT
    c0, c1, c2, c3 = cubics.unbind(-1)
    size = ((c3 * t + c2) * t + c1) * t + c0
    return torch.where((hashes & (1 << 10)) != 0, -size, size).to(torch.float32)
