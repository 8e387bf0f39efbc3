"""Binary search in ascending numbers, many at a time: which of several neighbours has an item."""

import triton
import triton.language as tl


def halvings(count: int) -> int:
    """Enough to search so many numbers."""
    return count.bit_length()


@triton.jit
def not_above(starts, first, count, values, live, halvings):
    """How many of `starts[first : first + count]`, ascending, are not above each value; first and count may be one a value."""
    low = tl.zeros_like(values)
    high = low + count
    for _ in range(halvings):
        middle = (low + high) // 2
        inside = live & (low < high)
        at_most = tl.load(starts + first + middle, mask=inside, other=0) <= values
        low = tl.where(inside & at_most, middle + 1, low)
        high = tl.where(inside & ~at_most, middle, high)
    return low
