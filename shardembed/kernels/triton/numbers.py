"""Numbers on their way into and out of the kernels, to the last bit: narrow tables, settings, quotients and roots.

No `from __future__ import annotations` here and beside: Triton's interpreter would not see which arguments are constants.
"""

import struct

import triton
import triton.language as tl


def bits_of(number: float) -> int:
    """A double as the integer that has its bits: as a float it would reach a kernel in float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


@triton.jit
def number_of(bits, dtype: tl.constexpr):
    """The number behind `bits_of`, rounded to `dtype` once, as torch rounds a Python number."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True).to(dtype)


@triton.jit
def widen(values, dtype: tl.constexpr):
    """`values` in the wider `dtype`, exactly."""
    if values.dtype == tl.bfloat16:
        # By bits, as the hardware does: Triton's interpreter makes zeros of bfloat16's subnormal numbers.
        wide = (values.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = values.to(dtype)
    return wide


@triton.jit
def nearest(values, dtype: tl.constexpr):
    """`values` rounded to `dtype`, ties to even."""
    if dtype == tl.bfloat16:
        # By bits: Triton's interpreter cuts off what does not fit.
        bits = values.to(tl.int32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        narrow = tl.where(values != values, 0x7FC0, rounded).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = values.to(dtype)
    return narrow


@triton.jit
def cut(values):
    """float32 numbers that bfloat16 holds, in bfloat16."""
    return (values.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def quotient(a, b):
    """a / b to the nearest; plain float32 division is approximate on a GPU."""
    if a.dtype == tl.float64:
        result = a / b
    else:
        result = tl.div_rn(a, b)
    return result


@triton.jit
def root(a):
    """The square root, to the nearest."""
    if a.dtype == tl.float64:
        result = tl.sqrt(a)
    else:
        result = tl.sqrt_rn(a)
    return result
