"""Stochastic rounding inside a kernel, bit for bit that of `kernels/rounding.py`.

The noise of an element is a hash of its table, its row and column there, and the step. A slab row belongs to a block, a shard's
rows in the slab, which knows its table; the blocks of a slab do not change, so they are sent to the device once.
"""

import torch
import triton
import triton.language as tl

from shardembed.kernels import mixing, rounding
from shardembed.kernels.triton.mixing import mixed, shifted
from shardembed.kernels.triton.numbers import cut, nearest

GAMMA = tl.constexpr(mixing.GAMMA)
FLOAT16_NORMAL = tl.constexpr(rounding.FLOAT16_NORMAL)
FLOAT16_SPACING = tl.constexpr(rounding.FLOAT16_SPACING)
BFLOAT16_MASK = tl.constexpr((1 << rounding.DROPPED_BITS[torch.bfloat16]) - 1)
FLOAT16_MASK = tl.constexpr((1 << rounding.DROPPED_BITS[torch.float16]) - 1)


@triton.jit
def stochastic(values, dtype: tl.constexpr, rows, live, blocks, count, stepped, HALVINGS: tl.constexpr):
    """float32 `values` of these slab rows in `dtype` (bfloat16 or float16), up or down at random; inf and nan stay.

    blocks, count: `rounding.Blocks`. stepped: `rounding.stepped`. HALVINGS: 2 to its power is more than count.
    """
    noise = _noise(values, rows, live, blocks, count, stepped, HALVINGS)
    bits = values.to(tl.int32, bitcast=True)
    finite = tl.abs(values) < float("inf")
    if dtype == tl.bfloat16:
        rounded = ((bits + (noise & BFLOAT16_MASK).to(tl.int32)) & ~BFLOAT16_MASK).to(tl.float32, bitcast=True)
        fits = finite & (tl.abs(rounded) < float("inf"))
        narrow = tl.where(fits, cut(rounded), nearest(values, dtype))
    else:
        rounded = ((bits + (noise & FLOAT16_MASK).to(tl.int32)) & ~FLOAT16_MASK).to(tl.float32, bitcast=True)
        rounded = tl.where(tl.abs(values) < FLOAT16_NORMAL, _evenly_spaced(values, noise), rounded)
        fits = finite & (tl.abs(rounded.to(tl.float16).to(tl.float32)) < float("inf"))
        narrow = tl.where(fits, rounded, values).to(tl.float16)
    return narrow


@triton.jit
def _evenly_spaced(values, noise):
    """To multiples of float16's least number."""
    scaled = values * (1.0 / FLOAT16_SPACING)  # a power of two: as exact as the quotient
    below = tl.floor(scaled)
    up = (noise & 0xFFFFFF).to(tl.float32) * (1.0 / 0x1000000) < scaled - below
    return (below + up.to(tl.float32)) * FLOAT16_SPACING


@triton.jit
def _noise(values, rows, live, blocks, count, stepped, HALVINGS: tl.constexpr):
    """32 random bits an element, as int64."""
    block = _block_of(rows, live, blocks, count, HALVINGS)
    first = tl.load(blocks + block, mask=live, other=0)
    table = tl.load(blocks + count + block, mask=live, other=0)
    start = tl.load(blocks + 2 * count + block, mask=live, other=0)
    stride = tl.load(blocks + 3 * count + block, mask=live, other=0)
    column = tl.load(blocks + 4 * count + block, mask=live, other=0)
    row = mixed(mixed(table + stepped) ^ (start + (rows - first) * stride))
    columns = column[:, None] + tl.arange(0, values.shape[1])[None, :]
    return shifted(mixed(row[:, None] + columns * GAMMA), 32)


@triton.jit
def _block_of(rows, live, blocks, count, HALVINGS: tl.constexpr):
    """The number of the last block that begins at or before each row."""
    block = tl.zeros_like(rows)
    for halving in tl.static_range(HALVINGS - 1, -1, -1):
        later = block + (1 << halving)
        inside = live & (later < count)
        begins = tl.load(blocks + later, mask=inside, other=0)
        block = tl.where(inside & (begins <= rows), later, block)
    return block
