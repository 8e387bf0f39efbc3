"""No proof, no gap: what a solver says is checked before it is called a bound, and a bound that there is not is None everywhere."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sparse
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from shardembed import planner
from shardembed.planner import charts, highs, page, report, sweep, topology, words, workload
from shardembed.planner.highs import PLAN, Effort, Program, branched, dual, relaxed
from shardembed.planner.problem import Item, Option, Problem
from shardembed.planner.result import INTERRUPTED, OUT_OF_TIME, Planned
from shardembed.planner.search import Solution, solve
from tests.amount import examples

Found = Any  # what scipy.optimize.milp and linprog give


def whole_programs() -> st.SearchStrategy[tuple[Program, float, np.ndarray]]:
    """A small program in whole numbers, the least that any of its points costs (inf where it has none), and multipliers."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> tuple[Program, float, np.ndarray]:
        n, m = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        numbers = st.integers(-4, 4).map(float)
        matrix = np.array([[draw(numbers) for _ in range(n)] for _ in range(m)])
        low = np.array([draw(st.sampled_from([-np.inf, -3.0, 0.0, 1.0])) for _ in range(m)])
        high = np.array([max(side, draw(st.sampled_from([0.0, 1.0, 2.0, np.inf]))) for side in low])
        upper = np.array([float(draw(st.integers(0, 3))) for _ in range(n)])
        cost = np.array([draw(numbers) for _ in range(n)])
        points = np.stack(np.meshgrid(*(np.arange(int(most) + 1) for most in upper), indexing="ij"), -1).reshape(-1, n)
        rows = points @ matrix.T
        allowed = ((rows >= low) & (rows <= high)).all(1)
        least = float((points @ cost)[allowed].min(initial=np.inf))
        multipliers = np.array([draw(st.floats(-2, 2)) for _ in range(m)])
        return Program(cost, sparse.csr_array(matrix), low, high, upper, np.ones(n, dtype=bool)), least, multipliers

    return draw_one()


@examples(300)
@given(whole_programs())
def test_no_multipliers_whatever_prove_more_than_is_true(drawn: tuple[Program, float, np.ndarray]) -> None:
    program, least, multipliers = drawn
    value = dual(program, multipliers)
    assert value is None or value <= least


@examples(100)
@given(whole_programs())
def test_both_ways_to_solve_a_program_keep_to_the_truth(drawn: tuple[Program, float, np.ndarray]) -> None:
    program, least, _ = drawn
    for answer in (relaxed(program, PLAN), branched(program, PLAN, 0.0)):
        assert answer.bound is None or answer.bound <= least + 1e-9
        assert not (answer.impossible and np.isfinite(least))
    if np.isfinite(least):
        found = branched(program, PLAN, 0.0)
        assert found.values is not None
        assert found.bound == pytest.approx(least, abs=1e-6)
        assert program.cost @ found.values == pytest.approx(least, abs=1e-6)


def test_a_variable_without_a_limit_leaves_a_bound_that_is_finite_and_true() -> None:
    # minimise z with z >= 2 and z >= 3: multipliers that pull twice as much as z costs are scaled down, not thrown away.
    ones = sparse.csr_array(np.ones((2, 1)))
    program = Program(np.ones(1), ones, np.array([2.0, 3.0]), np.full(2, np.inf), np.array([np.inf]), np.zeros(1, dtype=bool))
    assert dual(program, np.array([1.0, 1.0])) == pytest.approx(2.5)
    assert dual(program, np.array([0.0, 1.0])) == pytest.approx(3.0)
    assert dual(program, np.array([-1.0, 0.0])) is None  # there is no upper side to hold on to


# A solver that lies, gives nothing, or is cut off.


def piece(seconds: float) -> Option:
    return Option("whole", np.full((1, 1), seconds), np.ones(1), np.zeros(1))


THREE = Problem(("phase",), 2, 9.0, tuple(Item(name, (piece(1.0 + index),)) for index, name in enumerate("xyz")))
BEST = 3.0  # 1 + 2 on one rank, 3 on the other


def stub(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Found], None]) -> None:
    real = getattr(highs, name)

    def solver(*arguments: Any, **options: Any) -> Found:
        found = real(*arguments, **options)
        change(found)
        return found

    monkeypatch.setattr(highs, name, solver)


def nothing(found: Found) -> None:
    found.x, found.status, found.mip_dual_bound = None, 1, None


def impossible(found: Found) -> None:
    found.x, found.status, found.mip_dual_bound = None, 2, None


def ten_times(found: Found) -> None:
    found.mip_dual_bound = 10.0 * found.mip_dual_bound


def backwards(found: Found) -> None:
    if found.x is None:
        return  # there are no multipliers then
    found.ineqlin.marginals = -np.asarray(found.ineqlin.marginals)
    found.eqlin.marginals = 100.0 * np.asarray(found.eqlin.marginals)


def solved() -> Solution:
    found = solve(THREE)
    assert found is not None
    assert found.score.step == BEST
    return found


def test_an_honest_solver_proves_the_optimum() -> None:
    assert solved().gap == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("change", [nothing, impossible])
def test_a_solver_without_an_answer_leaves_a_plan_without_a_gap(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Found], None]
) -> None:
    stub(monkeypatch, "milp", change)
    stub(monkeypatch, "linprog", change)
    found = solved()
    assert (found.bound, found.gap) == (None, None)


def test_a_bound_that_is_too_high_gives_way_to_what_can_be_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, "milp", ten_times)
    found = solved()
    assert found.bound is not None
    assert found.bound <= BEST
    stub(monkeypatch, "linprog", backwards)
    again = solved().bound
    assert again is None or again <= BEST


def test_a_bound_that_its_own_plan_contradicts_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def alone_and_too_high(found: Found) -> None:  # no point beside it that would give it away
        found.x, found.mip_dual_bound = None, 10.0 * found.mip_dual_bound

    stub(monkeypatch, "milp", alone_and_too_high)
    stub(monkeypatch, "linprog", nothing)
    found = solved()
    assert (found.bound, found.gap) == (None, None)


def test_ctrl_c_gives_the_best_so_far_with_its_true_gap() -> None:
    seen: list[float | None] = []

    def press(doing: str, step: float | None, bound: float | None) -> None:
        seen.append(step)
        if step is not None:
            raise KeyboardInterrupt

    found = solve(THREE, progress=press)
    assert found is not None
    assert found.stopped == INTERRUPTED
    assert found.score.step == seen[-1]
    assert found.bound is not None
    assert found.bound <= BEST

    def at_once(doing: str, step: float | None, bound: float | None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # there is no plan yet
        solve(THREE, progress=at_once)


def test_work_decides_and_not_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, four = workload.load("synthetic-tiny"), topology.load("h100x8", ranks=4)
    first = planner.plan(asked, four, effort=Effort(rounds=10))
    ticks = iter(range(0, 1 << 40, 3600))  # an hour passes between two looks
    monkeypatch.setattr(time, "monotonic", lambda: float(next(ticks)))
    again = planner.plan(asked, four, effort=Effort(rounds=10))
    assert again.plan == first.plan
    assert again.lower_bound_seconds == first.lower_bound_seconds
    assert (first.stopped, again.stopped) == ("", "")
    hurried = planner.plan(asked, four, effort=Effort(rounds=10), seconds=1.0)
    assert hurried.stopped == OUT_OF_TIME


@pytest.fixture(scope="module")
def unproved() -> Planned:
    return replace(planner.plan(workload.load("synthetic-tiny"), topology.load("h100x8", ranks=4)), lower_bound_seconds=None)


def test_no_path_prints_a_gap_that_there_is_not(unproved: Planned) -> None:
    point = sweep.point_of(unproved)
    swept = sweep.Sweep("synthetic-tiny", "h100x8", 65536, (point,))
    assert json.loads(json.dumps(report.as_json(unproved)))["gap"] is None
    assert json.loads(json.dumps(sweep.as_json(swept)))["points"][0]["lower_bound_seconds"] is None
    for show in (lambda console: report.show(console, unproved), lambda console: sweep.show(console, swept)):
        written = io.StringIO()
        show(Console(file=written, width=160))
        line = next(line for line in written.getvalue().splitlines() if "none proved" in line)
        assert "0.00 %" not in line
    drawn = page.render(unproved, swept, command="shardembed plan")
    assert words.NOT_PROVED in drawn
    assert "no plan takes less than" not in drawn
    charts.scaling(swept)
