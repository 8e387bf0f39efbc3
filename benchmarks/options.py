"""What a run of `shardembed bench` was asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """ranks: numbers of ranks, one after the other. rounds, steps: rounds of turns, and counted steps of a turn. full: all
    contenders. samples: of one rank's batch; None is the workload's own. keep_memory: as of `se.init`, for ours. only: contenders
    whose names match; ours by default always takes part.
    """

    ranks: tuple[int, ...] = (1, 2)
    workloads: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    rounds: int = 10
    steps: int = 3
    full: bool = False
    max_rows: int = 400_000
    samples: int | None = None
    keep_memory: bool = True
    only: str = ""

    def wants(self, name: str) -> bool:
        return re.search(self.only, name) is not None
