"""Ids and counters mixed inside a kernel, bit for bit as in `kernels/mixing.py`."""

import triton
import triton.language as tl

from shardembed.kernels import mixing

MIX_1, MIX_2 = tl.constexpr(mixing.MIX_1), tl.constexpr(mixing.MIX_2)


@triton.jit
def mixed(x):
    """splitmix64's finalizer; int64 arithmetic wraps as it should."""
    x = (x ^ shifted(x, 30)) * MIX_1
    x = (x ^ shifted(x, 27)) * MIX_2
    return x ^ shifted(x, 31)


@triton.jit
def shifted(x, BITS: tl.constexpr):
    """A logical shift to the right."""
    return (x >> BITS) & (2 ** (64 - BITS) - 1)


@triton.jit
def tag_of(x, flip, factor_1, factor_2):
    """As `mixing.tags_of`."""
    x = (x ^ flip) * factor_1
    x = (x ^ shifted(x, 32)) * factor_2
    return shifted((x ^ shifted(x, 32)) * MIX_2, 32)
