"""The tag of an all-reduce: numbers at the end of its buffer by which ranks notice that they add up different things.

The digits are those of a checksum of all calls so far. Numbers are all d exactly when their sum is R d and that of their squares
R d^2; or, where the maximum is taken, when the largest is d and the largest of their negatives -d.
"""

from __future__ import annotations

import torch

DIGITS = 4  # base 64: their squares, summed over 4,096 ranks, are exact in float32
TAG = 2 * DIGITS  # elements of a tag
ROW = 32  # a control message has a multiple of so many values, so that different ones mostly have one length


def tag_of(checksum: int, maximum: bool) -> list[int]:
    """What this rank puts there."""
    digits = [(checksum >> 6 * i) % 64 + 1 for i in range(DIGITS)]
    return digits + ([-digit for digit in digits] if maximum else [digit**2 for digit in digits])


def reduced(tag: list[int], world_size: int, maximum: bool) -> list[int]:
    """What must come out where all ranks put `tag` there."""
    return tag if maximum else [world_size * part for part in tag]


def with_room(values: torch.Tensor) -> torch.Tensor:
    """The values as float64 `[n + TAG]`, n a multiple of `ROW`; zeros follow them."""
    padded = -(-values.numel() // ROW) * ROW
    row = torch.zeros(padded + TAG, dtype=torch.float64, device=values.device)
    row[: values.numel()] = values.reshape(-1)
    return row
