"""The quantiles of the normal distribution as a table of cubics, so that normal numbers are the same bits wherever they are drawn.

Logarithms, and even square roots, differ by a bit between libraries and between vector and scalar code. Here a draw is a look into
a table and three products and sums in float64, each of which is rounded alike everywhere.

52 bits of noise, and a 1 after them, are an odd number x below 2^53; p = x / 2^54, below a half, is the share of the distribution
that lies beyond the number that is drawn, on a side that one more bit chooses. As a double, x has an exponent (53 of them, 0 to
52) and a mantissa, of which the first 5 bits choose one of 32 segments and the other 47 say where in it p lies, t in [0, 1). Both
together number the segment, and each has a cubic in t through four quantiles. So tails are as fine as the middle: the largest
number is 8.2, and the error stays below 1e-7 everywhere (`tests/unit/kernels/test_starting.py`).
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray

EXPONENTS = 53
SEGMENT_BITS = 5
IN_SEGMENT = 52 - SEGMENT_BITS  # bits of the mantissa that say where in a segment
FIRST = 1023 << SEGMENT_BITS  # the number of segment 0, as the bits of a double have it
# Python's quantiles are right to about 2^-49, but their last bits are those of the machine's logarithm. Rounded to this they are
# the same on all; no quantile of the table lies so near to the middle of two multiples that this could fail.
GRAIN = 2.0**-28


def knots() -> list[float]:
    """The numbers beyond which a share p lies, for p at the ends and the thirds of all segments, as Python has them."""
    thirds = 3 << SEGMENT_BITS
    shares = ((1 + third / thirds) * 2.0 ** (exponent - 54) for exponent in range(EXPONENTS) for third in range(thirds))
    normal = NormalDist()
    return [*(-normal.inv_cdf(share) for share in shares), 0.0]


@cache
def quantile_table() -> NDArray[np.float64]:
    """The coefficients of each segment's cubic, that of t^0 first, float64 `[53 * 32, 4]`."""
    rounded = np.array([round(knot / GRAIN) * GRAIN for knot in knots()])
    f0, f1, f2, f3 = rounded[:-1:3], rounded[1::3], rounded[2::3], rounded[3::3]
    # Of multiples of the grain with 32 bits: all of this is exact.
    slope = (18 * f1 - 11 * f0 - 9 * f2 + 2 * f3) / 2
    square = (18 * f0 - 45 * f1 + 36 * f2 - 9 * f3) / 2
    cube = (27 * f1 - 9 * f0 - 27 * f2 + 9 * f3) / 2
    table = np.stack([f0, slope, square, cube], axis=1)
    table.flags.writeable = False
    return table


@cache
def on_device(device: torch.device) -> torch.Tensor:
    """The same as a tensor, for good."""
    return torch.from_numpy(quantile_table().copy()).to(device)
