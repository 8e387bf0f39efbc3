"""Starting numbers of rows, element by element from a hash: what `kernels/starting.py` says, a program for so many elements."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from shardembed.kernels import mixing, quantiles
from shardembed.kernels.triton.mixing import mixed, shifted
from shardembed.kernels.triton.numbers import bits_of, number_of
from shardembed.kernels.triton.tiles import launch

if TYPE_CHECKING:
    from shardembed.kernels.starting import Distribution

GAMMA = tl.constexpr(mixing.GAMMA)
IN_SEGMENT, FIRST = tl.constexpr(quantiles.IN_SEGMENT), tl.constexpr(quantiles.FIRST)
BLOCK = 1024


def draw(out_NW: torch.Tensor, ids_N: torch.Tensor, first_column: int, numbers: "Distribution") -> None:
    """As `kernels.starting.draw`; the ids are contiguous. Waits for nothing."""
    width, elements = out_NW.shape[1], out_NW.numel()
    if not elements:
        return
    launch(
        _draw,
        -(-elements // BLOCK),
        out_NW,
        ids_N,
        quantiles.on_device(out_NW.device),
        elements,
        numbers.base,
        first_column,
        bits_of(numbers.scale),  # as a float an offset of -0.0 would lose its sign
        bits_of(numbers.offset),
        WIDTH=width,
        NORMAL=numbers.normal,
        BLOCK=BLOCK,
        enable_fp_fusion=False,  # products and sums rounded one by one, as those of the other ways
    )


@triton.jit(do_not_specialize=["elements", "base", "first_column", "scale", "offset"])
def _draw(
    out,
    ids,
    quantiles,
    elements,
    base,
    first_column,
    scale,
    offset,
    WIDTH: tl.constexpr,
    NORMAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = element < elements
    row = element // WIDTH
    column = element - row * WIDTH + first_column
    hashes = mixed(mixed(tl.load(ids + row, mask=live, other=0) ^ base.to(tl.int64)) + column * GAMMA)
    if NORMAL:
        x = _normal(hashes, quantiles)
    else:
        x = shifted(hashes, 40).to(tl.float32) * (1.0 / 0x1000000)
    tl.store(out + element, x * number_of(scale, tl.float32) + number_of(offset, tl.float32), mask=live)


@triton.jit
def _normal(hashes, quantiles):
    """Normal numbers, float32; quantiles: of `quantile_table`."""
    bits = (shifted(hashes, 11) | 1).to(tl.float64).to(tl.int64, bitcast=True)
    cubic = quantiles + ((bits >> IN_SEGMENT) - FIRST) * 4
    t = (bits & (2**IN_SEGMENT - 1)).to(tl.float64) * (1.0 / 2**IN_SEGMENT)
    size = (tl.load(cubic + 3) * t + tl.load(cubic + 2)) * t
    size = (size + tl.load(cubic + 1)) * t + tl.load(cubic)
    return tl.where((hashes & 1024) != 0, -size, size).to(tl.float32)
