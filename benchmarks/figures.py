"""Medians with their spread, and ratios of what ran side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Times = Sequence[float | None]  # by step, in order of rounds; None where a contender sat out


@dataclass(frozen=True)
class Spread:
    """Quartiles of a sample, and its least."""

    low: float
    median: float
    high: float
    least: float

    def __format__(self, form: str) -> str:
        return f"{self.median:{form}} ({self.low:{form}} to {self.high:{form}})"


def spread(values: Times) -> Spread:
    """Of the steps that it made."""
    ran = [value for value in values if value is not None]
    low, median, high = (float(number) for number in np.quantile(ran, [0.25, 0.5, 0.75]))
    return Spread(low, median, high, min(ran))


def ratio(times: Times, to: Times) -> Spread:
    """How many times as long as `to`, step by step: what troubles a round troubles both."""
    pairs = [one / other for one, other in zip(times, to, strict=True) if one is not None and other is not None]
    return spread(pairs)
