"""Decides the cut of every table, and proves how far from the best it is. Pure arithmetic: no process group, no weights."""

from __future__ import annotations

import time
from dataclasses import replace

from shardembed.errors import PlanError
from shardembed.planner.bound import lower_bound
from shardembed.planner.constraints import Constraints
from shardembed.planner.cost import estimate
from shardembed.planner.cost_model import CostModel
from shardembed.planner.highs import PLAN, Effort
from shardembed.planner.infeasible import explain
from shardembed.planner.packed import packed
from shardembed.planner.problem import Problem, score
from shardembed.planner.result import OUT_OF_TIME, Estimate, Planned
from shardembed.planner.search import Progress, Solution, solve
from shardembed.planner.space import Space
from shardembed.planner.topology import Topology
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.plan import Plan

TRIES = 3  # at a plan that fits when counted from its shards
SLACK = 1e-6  # relative; a bound that lies further above a plan is none

__all__ = ["Constraints", "Effort", "Estimate", "Plan", "Planned", "TableLoad", "Topology", "Workload", "estimate", "plan"]


def plan(
    workload: Workload,
    topology: Topology,
    constraints: Constraints | None = None,
    *,
    seed: int = 0,
    effort: Effort = PLAN,
    seconds: float | None = None,
    progress: Progress | None = None,
) -> Planned:
    """The fastest plan that the search finds, and a lower bound on the step time of any plan in the space (`space.py`).

    Args:
        constraints: what the plan must keep to; the bound is over the plans that do.
        seed: of the search; the same inputs and seed give the same plan and the same bound on any machine, however busy.
        effort: how hard to look, in work and not in time.
        seconds: after which to stop with the best so far; then the result may hang on the machine, and its `stopped` says so.
        progress: called with what is being done, and seconds of the best step so far and of the bound, where there are any.

    Raises:
        PlanError: the constraints ask for what cannot be had; or no plan fits into memory. Then the message is the proof: which
            table or what sum does not fit, and the smallest changes that would make room.
    """
    started = time.monotonic()
    effort = effort if seconds is None else replace(effort, until=started + seconds)
    constraints = constraints or Constraints()
    constraints.check(workload, topology)
    model = CostModel(workload, topology)
    space = Space(model, constraints)
    problem = space.problem()
    first: Solution | None = None
    used = 0.0
    for _ in range(TRIES):
        solution = solve(problem, seed, effort, progress) or _by_program(problem, effort)
        if solution is None:
            break
        first = first or solution
        # What the search adds up leaves out what hangs on several tables: of plans about as fast, the count decides.
        found, counted = _counted(solution, problem, space)
        for other in solution.near:
            also, again = _counted(other, problem, space)
            if again.memory_bytes.max() <= topology.room and again.step_seconds < counted.step_seconds:
                found, counted = also, again
        used = float(counted.memory_bytes.max())
        if used <= topology.room:
            bound = _certified(first.bound, counted.step_seconds)
            return Planned(found, workload, topology, counted, bound, time.monotonic() - started, solution.stopped)
        # Where popular rows fall, a shard holds more than its share says: ask for as much less.
        problem = replace(problem, capacity=problem.capacity * min(0.99, problem.capacity / used))
    if first is not None:
        raise PlanError(
            f"a plan was found, but its fullest rank needs {used / 2**30:.2f} GiB of {problem.capacity / 2**30:.2f} when counted "
            "shard by shard; give ranks a little more memory, or use more ranks"
        )
    raise PlanError(explain(model, space, problem))


def _counted(solution: Solution, problem: Problem, space: Space) -> tuple[Plan, Estimate]:
    model = space.model
    found = space.plan(solution.problem or problem, solution.choices)
    return found, estimate(found, model.workload, model.topology, model)


def _certified(bound: float | None, step: float) -> float | None:
    """The bound, for a plan that was counted from its shards: their last digits may differ, but no more."""
    if bound is None or bound > step * (1 + SLACK):
        return None
    return min(bound, step)


def _by_program(problem: Problem, effort: Effort) -> Solution | None:
    """Where memory is so tight that the search finds nothing."""
    bound = lower_bound(problem, effort)
    choices = None if bound is None else packed(problem, effort).choices
    if bound is None or choices is None:
        return None
    found = score(problem, choices)
    return Solution(choices, found, bound.under(found.step).value, OUT_OF_TIME if effort.over else "")
