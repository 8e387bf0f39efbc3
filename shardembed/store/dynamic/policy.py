"""Who may stay: what a table's settings say of age, fame and order, as the numbers that compiled code takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardembed.tables.dynamic import LFU, LRU, TTL, Dynamic

NEVER = 1 << 62  # steps


@dataclass(frozen=True)
class Policy:
    """Of one table.

    Attributes:
        lives: steps that a row outlives its last gradient; `NEVER` where age does not matter.
        halves: steps after which counts are halved; `NEVER` where they are not.
        by_count: the lowest count leaves first; else the one that was touched the longest ago.
        evicts: rows leave a full bucket.
        counts: whether counts are kept.
    """

    lives: int
    halves: int
    by_count: bool
    evicts: bool
    counts: bool

    @staticmethod
    def of(dynamic: Dynamic) -> Policy:
        eviction = dynamic.eviction
        return Policy(
            eviction.steps if isinstance(eviction, TTL) else NEVER,
            (eviction.halve_every or NEVER) if isinstance(eviction, LFU) else NEVER,
            isinstance(eviction, LFU),
            isinstance(eviction, LRU | LFU),
            dynamic.counts_ids,
        )

    @property
    def lives_on(self) -> bool:
        """Whether rows do not die of age."""
        return self.lives == NEVER

    def alive(self, lasts: torch.Tensor, steps: int) -> torch.Tensor:
        """Whether rows that were touched last in these steps are there after `steps` steps."""
        return lasts.to(torch.int64) + self.lives > steps

    def halved(self, counts: torch.Tensor, lasts: torch.Tensor, now: int) -> torch.Tensor:
        """Counts of step `lasts` as they stand in step `now`, int64."""
        counts = counts.to(torch.int64)
        if self.halves == NEVER:
            return counts
        return counts >> (now // self.halves - lasts.to(torch.int64) // self.halves).clamp(max=62)
