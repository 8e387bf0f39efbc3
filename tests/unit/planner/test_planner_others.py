"""Other starts than the relaxation's: what they choose keeps to what is asked of it, and no plan is the worse for them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from shardembed import planner
from shardembed.planner import search, topology, workload
from shardembed.planner.bound import Bound, Relaxation, lower_bound
from shardembed.planner.highs import PLAN, Effort
from shardembed.planner.others import others
from shardembed.planner.problem import Problem
from shardembed.planner.search import solve
from tests.amount import examples
from tests.unit.planner.planning import Solutions, problems

CLOSE = 1e-6  # relative; what HiGHS may be off by
SOME = Effort(rounds=20)


@examples(80, HealthCheck.data_too_large)
@given(problems(), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_phase_held_to_an_interval_stays_there_and_costs_no_less(
    drawn: tuple[Problem, Solutions], first: float, second: float
) -> None:
    problem, _ = drawn
    bound, relaxation = lower_bound(problem, PLAN), Relaxation.of(problem)
    if bound is None or relaxation is None:
        assert bound is None
        assert relaxation is None
        return
    for phase, target in enumerate(bound.targets):
        low, high = sorted((2 * first * target, 2 * second * target))
        held = relaxation.within(phase, low, high, PLAN)
        if held is None:
            continue
        slack = CLOSE * relaxation.unit
        assert low - slack <= held.targets[phase] <= high + slack
        assert held.value is not None
        assert held.value >= bound.values[0] * (1 - 1e-4)  # of the linear program, which it adds a demand to
        assert len(held.options) == len(problem.items)


@examples(60, HealthCheck.data_too_large)
@given(problems())
def test_all_solutions_from_other_starts_are_solutions(drawn: tuple[Problem, Solutions]) -> None:
    problem, every = drawn
    found = solve(problem, 0, SOME)
    if found is None:
        return
    best = every.best(problem.capacity)
    assert best is not None
    bound = lower_bound(problem, PLAN)
    assert bound is not None
    steps = [start.value for start in others(bound, found.score, PLAN)]
    assert steps == sorted(steps, key=lambda step: step or 0.0)
    for one in (found, *found.near):
        assert one.score.memory.max() <= problem.capacity
        assert one.score.step >= max(found.score.step, float(every.steps[best]) * (1 - 1e-9))


@pytest.mark.exhaustive
def test_ranks_that_hold_one_large_part_or_two_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    # On 32 ranks there is room for one bag part of DLRM-DCNv2 a rank; the relaxation's own choice makes a few more than 32.
    job, machines = workload.load("dlrm-dcnv2"), topology.load("h100x8").scaled(32)
    few = Effort(rounds=10)
    with_others = planner.plan(job, machines, effort=few)
    monkeypatch.setattr(search, "others", lambda *_: list[Bound]())
    without = planner.plan(job, machines, effort=few)
    assert with_others.lower_bound_seconds == pytest.approx(without.lower_bound_seconds)
    assert with_others.estimate.step_seconds < 0.9 * without.estimate.step_seconds
    back = with_others.estimate.phases.index("vectors back")
    waits = [np.ptp(one.estimate.seconds[back]) for one in (with_others, without)]
    assert waits[0] < 0.5 * waits[1]
