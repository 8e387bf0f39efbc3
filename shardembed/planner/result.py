"""What planning gives: a plan, what it is expected to cost, and the proof of how good it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardembed.planner.topology import Topology
from shardembed.planner.workload import Workload
from shardembed.tables.plan import Plan

Array = NDArray[np.float64]
INTERRUPTED, OUT_OF_TIME = "interrupted", "out of time"  # why a search ended early


@dataclass(frozen=True, eq=False)
class Estimate:
    """The cost of a plan, counted from its shards.

    Attributes:
        phases: their names.
        seconds: `[phases, ranks]`.
        bytes: what each rank sends in each phase (its own share left out), `[phases, ranks]`.
        categories: names of what memory is taken for.
        memory: `[categories, ranks]` bytes.
        table_seconds: `[tables, phases]`, what a table adds to all ranks together.
        table_memory: `[tables, ranks]` bytes of weights and optimizer state.
    """

    phases: tuple[str, ...]
    seconds: Array
    bytes: Array
    categories: tuple[str, ...]
    memory: Array
    table_seconds: Array
    table_memory: Array

    @property
    def phase_seconds(self) -> Array:
        """The slowest rank of every phase, `[phases]`: phases are separated by collectives."""
        return self.seconds.max(1)

    @property
    def step_seconds(self) -> float:
        return float(self.phase_seconds.sum())

    @property
    def memory_bytes(self) -> Array:
        """`[ranks]`."""
        return self.memory.sum(0)


@dataclass(frozen=True, eq=False)
class Planned:
    """A plan with its certificate.

    Attributes:
        plan: the plan.
        workload: that it is for.
        topology: that it is for.
        estimate: what it costs.
        lower_bound_seconds: no plan in the planner's space takes less by the same cost; None where nothing is proved.
        plan_seconds: that planning took.
        stopped: why the work ended early (`INTERRUPTED`, `OUT_OF_TIME`), or empty.
    """

    plan: Plan
    workload: Workload
    topology: Topology
    estimate: Estimate
    lower_bound_seconds: float | None
    plan_seconds: float
    stopped: str = ""

    @property
    def gap(self) -> float | None:
        """How far above the bound the plan is, as a share of the bound; None where there is no bound."""
        return gap_of(self.estimate.step_seconds, self.lower_bound_seconds)


def gap_of(step: float, bound: float | None) -> float | None:
    """How far a step lies above a bound, as a share of it; None where there is no bound above 0 to compare with."""
    return None if bound is None or bound <= 0 else step / bound - 1.0
