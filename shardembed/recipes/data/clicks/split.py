"""Which rows are for validation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.recipes.ctr_config import SplitConfig
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.stream import hash_rows

CHUNK_ROWS = 1 << 15  # whose split is worked out at once
EARLIEST, LATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Split:
    """Of the rows of a source.

    Attributes:
        config: what was asked for.
        total: how many rows there are.
        cut: rows of this time and later ones are for validation, where they are split by time.
        latest: how many these are.
    """

    config: SplitConfig
    total: int
    cut: int = LATEST
    latest: int = 0

    @property
    def held(self) -> int:
        """How many rows are for validation."""
        if self.config.kind == "time":
            return self.latest
        if self.config.kind == "last":
            return self.total - self._first_last
        numbers = range(0, self.total, CHUNK_ROWS)
        return sum(int(self.of_numbers(first, min(CHUNK_ROWS, self.total - first)).sum()) for first in numbers)

    @property
    def _first_last(self) -> int:
        return self.total - round(self.total * self.config.fraction)

    def of(self, first: int, clicks: Clicks) -> np.ndarray:
        """Which of these rows, of which the first has the number `first`, are for validation: bool `[n]`."""
        if self.config.kind != "time":
            return self.of_numbers(first, len(clicks))
        assert clicks.times is not None
        return clicks.times >= self.cut if self.latest else np.zeros(len(clicks), bool)

    def of_numbers(self, first: int, count: int) -> np.ndarray:
        """As `of`, where that does not depend on what is in the rows."""
        if self.config.kind == "last":
            return np.arange(first, first + count) >= self._first_last
        # The upper 53 bits as a number from 0 to 1: exact, whatever the fraction.
        return (hash_rows(self.config.seed, first, count) >> np.uint64(11)).astype(np.float64) < self.config.fraction * 2.0**53


def by_time(config: SplitConfig, total: int, times: np.ndarray, comm: Comm) -> Split:
    """The split of `total` rows by their times, of which this rank has some, int64 `[n]`. Collective."""
    wanted = round(total * config.fraction)
    if not wanted:
        return Split(config, total)
    ascending = np.sort(times)

    def since(time: int) -> int:
        """How many rows of all ranks have this time or a later one."""
        mine = torch.tensor([len(ascending) - int(np.searchsorted(ascending, time))], dtype=torch.float64, device=default_device())
        return int(comm.all_reduce("split by time", mine).item())

    low, high = EARLIEST, LATEST  # since(low) >= wanted
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if since(middle) >= wanted else (low, middle - 1)
    return Split(config, total, low, since(low))
