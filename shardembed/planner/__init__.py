"""Decides the cut of every table, and proves how far from the best it is. Pure arithmetic: no process group, no weights."""

from __future__ import annotations

import time
from dataclasses import replace

from shardembed.errors import PlanError
from shardembed.plan import Plan
from shardembed.planner.bound import lower_bound
from shardembed.planner.constraints import Constraints
from shardembed.planner.cost import estimate
from shardembed.planner.cost_model import CostModel
from shardembed.planner.infeasible import explain
from shardembed.planner.packed import packed
from shardembed.planner.problem import Problem, score
from shardembed.planner.result import Estimate, Planned
from shardembed.planner.search import Progress, Solution, solve
from shardembed.planner.space import Space
from shardembed.planner.topology import Topology
from shardembed.planner.workload import TableLoad, Workload

TRIES = 3  # at a plan that fits when counted from its shards

__all__ = ["Constraints", "Estimate", "Plan", "Planned", "TableLoad", "Topology", "Workload", "estimate", "plan"]


def plan(
    workload: Workload,
    topology: Topology,
    constraints: Constraints | None = None,
    *,
    seed: int = 0,
    seconds: float = 6.0,
    progress: Progress | None = None,
) -> Planned:
    """The fastest plan that the search finds, and a lower bound on the step time of any plan in the space (`space.py`).

    Args:
        constraints: what the plan must keep to; the bound is over the plans that do.
        seed: of the search; the same inputs and seed give the same plan wherever the search ends by itself.
        seconds: after which the search ends with the best it has.
        progress: called with what is being done, and the gap so far.

    Raises:
        PlanError: the constraints ask for what cannot be had; or no plan fits into memory. Then the message is the proof: which
            table or what sum does not fit, and the smallest changes that would make room.
    """
    started = time.monotonic()
    constraints = constraints or Constraints()
    constraints.check(workload, topology)
    model = CostModel(workload, topology)
    space = Space(model, constraints)
    problem = space.problem()
    bound, used = None, 0.0
    for _ in range(TRIES):
        solution = solve(problem, seed, seconds, progress) or _by_program(problem, seconds)
        if solution is None:
            break
        bound = solution.bound if bound is None else bound
        found = space.plan(problem, solution.choices)
        counted = estimate(found, workload, topology, model)
        used = float(counted.memory_bytes.max())
        if used <= topology.memory - topology.reserve:
            bound = min(bound, counted.step_seconds)  # their last digits may differ
            return Planned(found, workload, topology, counted, bound, time.monotonic() - started)
        # Where popular rows fall, a shard holds more than its share says: ask for as much less.
        problem = replace(problem, capacity=problem.capacity * min(0.99, problem.capacity / used))
    if bound is not None:
        raise PlanError(
            f"a plan was found, but its fullest rank needs {used / 2**30:.2f} GiB of {problem.capacity / 2**30:.2f} when counted "
            "shard by shard; give ranks a little more memory, or use more ranks"
        )
    raise PlanError(explain(model, space, problem))


def _by_program(problem: Problem, seconds: float) -> Solution | None:
    """Where memory is so tight that the search finds nothing."""
    bound = lower_bound(problem, seconds / 4)
    choices = None if bound is None else packed(problem, seconds / 2).choices
    if bound is None or choices is None:
        return None
    return Solution(choices, score(problem, choices), bound.value)
