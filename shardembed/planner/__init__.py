"""Decides the cut of every table, and proves how far from the best it is. Pure arithmetic: no process group, no weights."""

from __future__ import annotations

import time

from shardembed.errors import PlanError
from shardembed.plan import Plan
from shardembed.planner.constraints import Constraints
from shardembed.planner.cost import estimate
from shardembed.planner.cost_model import CostModel
from shardembed.planner.infeasible import explain
from shardembed.planner.result import Estimate, Planned
from shardembed.planner.search import Progress, solve
from shardembed.planner.space import Space
from shardembed.planner.topology import Topology
from shardembed.planner.workload import TableLoad, Workload

__all__ = ["Constraints", "Estimate", "Plan", "Planned", "TableLoad", "Topology", "Workload", "estimate", "plan"]


def plan(
    workload: Workload,
    topology: Topology,
    constraints: Constraints | None = None,
    *,
    seed: int = 0,
    seconds: float = 8.0,
    progress: Progress | None = None,
) -> Planned:
    """The plan with the least expected step time that the search finds, and a lower bound on that of any plan in the space (`space.py`).

    Args:
        constraints: what the plan must keep to; the bound is over the plans that do.
        seed: of the search; the same inputs and seed give the same plan wherever the search ends by itself.
        seconds: after which the search ends with the best it has.
        progress: called with what is being done, and the gap so far.

    Raises:
        PlanError: no plan fits into memory. The message is the proof: which table or what sum does not fit, and the smallest
            change that would make room.
    """
    started = time.monotonic()
    model = CostModel(workload, topology)
    space = Space(model, constraints or Constraints())
    problem = space.problem()
    solution = solve(problem, seed, seconds, progress)
    if solution is None:
        raise PlanError(explain(model, space, problem))
    found = space.plan(problem, solution.choices)
    counted = estimate(found, workload, topology, model)
    # The count of real shards may differ in the last digits from the sum of options.
    bound = min(solution.bound, counted.step_seconds)
    return Planned(found, workload, topology, counted, bound, time.monotonic() - started)
