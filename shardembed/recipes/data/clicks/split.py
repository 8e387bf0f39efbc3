"""What rows are for: to train on, for the test, or for evaluations during training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.recipes.ctr_config import CtrDataConfig, SplitConfig
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.held import TEST, TRAINING, VALIDATION
from shardembed.recipes.data.stream import hash_rows

CHUNK_ROWS = 1 << 15  # whose split is worked out at once
EARLIEST, LATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Split:
    """Of the rows of a source.

    Attributes:
        config: what was asked for.
        total: how many rows there are.
        held: the parts that are held out, of `TEST` and `VALIDATION`, each with as many rows. Where they go by an order, the first
            has the last rows, and the second those before them.
        cuts: of each part the first moment, where they are split by time.
        latest: of each part how many rows it has, where they are split by time.
    """

    config: SplitConfig
    total: int
    held: tuple[int, ...] = (TEST,)
    cuts: tuple[int, ...] = ()
    latest: tuple[int, ...] = ()

    @staticmethod
    def asked(config: CtrDataConfig, total: int) -> Split:
        """Of `data.path`, as far as it is known before times are. Files of their own are the test."""
        test, validation = (TEST,) * (not config.validation_path), (VALIDATION,) * config.split.validation
        return Split(config.split, total, (*test, *validation))

    @property
    def by_time(self) -> bool:
        """Only the times of the rows tell."""
        return self.config.kind == "time" and bool(self.held)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many rows are for each part, by the number of the part."""
        found = np.zeros(3, np.int64)
        if self.config.kind == "time":
            found[list(self.held[: len(self.latest)])] = self.latest
            found[TRAINING] = self.total - found.sum()
        else:
            for first in range(0, self.total, CHUNK_ROWS):
                found += np.bincount(self.of_numbers(first, min(CHUNK_ROWS, self.total - first)), minlength=3)
        return tuple(found.tolist())

    def of(self, first: int, clicks: Clicks) -> np.ndarray:
        """What these rows, of which the first has the number `first`, are for: int8 `[n]`, `TRAINING`, `VALIDATION` or `TEST`."""
        if not self.by_time:
            return self.of_numbers(first, len(clicks))
        assert clicks.times is not None
        return self._labels(len(clicks), [clicks.times >= cut for cut in self.cuts])

    def of_numbers(self, first: int, count: int) -> np.ndarray:
        """As `of`, where that does not depend on what is in the rows."""
        if not self.held:
            return np.full(count, TRAINING, np.int8)
        shares = range(1, len(self.held) + 1)
        if self.config.kind == "last":
            numbers, each = np.arange(first, first + count), round(self.total * self.config.fraction)
            return self._labels(count, [numbers >= self.total - share * each for share in shares])
        # The upper 53 bits as a number from 0 to 1: exact, whatever the fraction.
        drawn = (hash_rows(self.config.seed, first, count) >> np.uint64(11)).astype(np.float64)
        return self._labels(count, [drawn < share * self.config.fraction * 2.0**53 for share in shares])

    def _labels(self, count: int, within: Iterable[np.ndarray]) -> np.ndarray:
        """int8 `[n]`; within: of each part, which rows are of it or of one before it, bool `[n]`."""
        found = np.full(count, TRAINING, np.int8)
        for part, mine in reversed(list(zip(self.held, within, strict=False))):  # of time there may be no part at all
            found[mine] = part
        return found


def with_times(split: Split, times: np.ndarray, comm: Comm) -> Split:
    """A split by time, with what it needs to know of the times of all rows. This rank has some, int64 `[n]`. Collective."""
    wanted = round(split.total * split.config.fraction)
    if not wanted:
        return split
    ascending = np.sort(times)

    def since(time: int) -> int:
        """How many rows of all ranks have this time or a later one."""
        mine = torch.tensor([len(ascending) - int(np.searchsorted(ascending, time))], dtype=torch.float64, device=default_device())
        return int(comm.all_reduce("split by time", mine).item())

    cuts: list[int] = []
    behind = [0]  # how many rows are of the parts up to each
    for _ in split.held:
        low, high = EARLIEST, LATEST
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if since(middle) >= behind[-1] + wanted else (low, middle - 1)
        cuts.append(low)
        behind.append(since(low))
    return replace(split, cuts=tuple(cuts), latest=tuple(np.diff(behind).tolist()))
