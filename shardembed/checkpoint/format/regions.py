"""Which rows two cuts of one table share. Rows are ascending `range`s: blocks, or every n-th row."""

from __future__ import annotations

from math import gcd


def common(a: range, b: range) -> tuple[range, range] | None:
    """The positions in `a` and the positions in `b` of the numbers that are in both, both ascending; None where there are none."""
    if not a or not b:
        return None
    shared = gcd(a.step, b.step)
    apart = b.start - a.start
    if apart % shared:
        return None
    # The first common number is a.start + i * a.step with i * a.step = apart (mod b.step); it repeats every lcm of the steps.
    every_a, every_b = b.step // shared, a.step // shared
    i = apart // shared * pow(every_b, -1, every_a) % every_a
    if i * a.step < apart:  # it lies before b begins
        i += -(-(apart - i * a.step) // (a.step * every_a)) * every_a
    j = (i * a.step - apart) // b.step
    count = min(-(-(len(a) - i) // every_a), -(-(len(b) - j) // every_b))
    if count <= 0:
        return None
    return _positions(i, every_a, count), _positions(j, every_b, count)


def _positions(first: int, step: int, count: int) -> range:
    """`count` positions; a single one has step 1, so that equal selections are equal ranges."""
    return range(first, first + 1) if count == 1 else range(first, first + (count - 1) * step + 1, step)
