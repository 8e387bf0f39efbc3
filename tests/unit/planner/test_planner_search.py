"""Search and bound, held to all solutions of small problems: the bound is below every one, and the certificate holds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given

import shardembed as se
from shardembed import planner
from shardembed.planner import topology
from shardembed.planner.bound import lower_bound
from shardembed.planner.constraints import Pin
from shardembed.planner.cost_model import CostModel
from shardembed.planner.exact import improved
from shardembed.planner.highs import PLAN, Effort
from shardembed.planner.needs import needed, needs
from shardembed.planner.packed import packed
from shardembed.planner.problem import Choice, Item, Option, Problem, score
from shardembed.planner.search import Solution, solve
from shardembed.planner.space import Space
from shardembed.planner.workload import Order, Skew, TableLoad, Uniform, Workload, Zipf, workload_of
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import Plan, TablePlan, resolve
from tests.amount import examples
from tests.unit.planner.planning import Solutions, choices_of, enumerated, has_shares, problems

SOME = Effort(rounds=20)  # certificates hold wherever a search ends
CLOSE = 1e-9  # relative
EACH = examples(120, HealthCheck.data_too_large)
TWO = topology.load("cpu", ranks=2)


def check_certificate(problem: Problem, solution: Solution, optimum: float) -> None:
    again = score(problem, solution.choices)
    assert again.step == solution.score.step
    assert again.memory.max() <= problem.capacity
    assert optimum * (1 - CLOSE) <= again.step
    assert solution.bound is not None  # HiGHS finds one for each of these, however busy the machine is
    assert solution.bound <= optimum * (1 + CLOSE)
    if optimum > 0:
        assert solution.gap is not None
        assert again.step <= optimum * (1 + solution.gap) * (1 + CLOSE)


@EACH
@given(problems())
def test_no_solution_beats_the_bound_and_those_found_keep_their_certificate(drawn: tuple[Problem, Solutions]) -> None:
    problem, every = drawn
    best = every.best(problem.capacity)
    bound, found = lower_bound(problem, PLAN), solve(problem, 0, SOME)
    if best is None:
        assert found is None
        return
    optimum = float(every.steps[best])
    counted = score(problem, every.choices(best))
    assert counted.step == pytest.approx(optimum, rel=CLOSE)
    assert bound is not None
    assert bound.value is not None
    assert bound.value <= optimum * (1 + CLOSE)
    better = improved(problem, found, PLAN)
    for solution in (found, better):
        if solution is not None:
            check_certificate(problem, solution, optimum)


@EACH
@given(problems())
def test_needs_hold_and_the_whole_program_finds_what_there_is(drawn: tuple[Problem, Solutions]) -> None:
    problem, every = drawn
    least, possible = float(every.memory.min()), every.best(problem.capacity) is not None
    for need in needs(problem):
        assert need.least <= least * (1 + CLOSE), need
    found = packed(problem, PLAN)
    if found.choices is not None:
        counted = score(problem, found.choices)
        assert counted.memory.max() <= problem.capacity
        assert counted.step >= every.steps[every.best(problem.capacity)] * (1 - CLOSE)
    assert not (found.impossible and possible)
    if not has_shares(problem):
        assert (found.choices is not None) == possible
        assert found.impossible != possible


@examples(10)
@given(problems(items=2))
def test_the_same_seed_gives_the_same_solution(drawn: tuple[Problem, Solutions]) -> None:
    problem, _ = drawn
    first, second = (solve(problem, 3) for _ in range(2))
    assert (first and first.choices) == (second and second.choices)


def test_needs_of_each_kind_are_found() -> None:
    seconds = np.ones(1)

    def item(name: str, memory: Sequence[float], ranks: tuple[int, ...] | None = None) -> Item:
        return Item(name, (Option(None, np.ones((len(memory), 1)), np.array(memory), seconds, ranks=ranks),))

    def least(*items: Item) -> dict[str, float]:
        return {need.kind: need.least for need in needs(Problem(("phase",), 2, 10.0, items))}

    assert least(item("a", [6.0, 1.0]), item("b", [1.0]))["table"] == 6
    assert least(*(item(name, [4.0]) for name in "abc"))["crowd"] == 8  # two of them on one rank
    assert least(item("a", [3.0], (1,)), item("b", [4.0, 2.0], (1, 0)), item("c", [1.0]))["rank"] == 7
    assert least(item("a", [6.0, 1.0]), item("b", [5.0, 2.0]))["total"] == 7
    assert needed(Problem(("phase",), 2, 10.0, tuple(item(name, [4.0]) for name in "abc"))) == 8


def test_where_large_parts_fit_no_rank_together_the_relaxation_promises_too_much() -> None:
    # The case that docs/planner.md tells of.
    seconds = {"a": (4, 1), "b": (4, 1), "c": (1, 3), "d": (3, 3)}
    items = (Item(name, (Option(None, np.array([line], dtype=float), np.ones(1), np.zeros(2)),)) for name, line in seconds.items())
    problem = Problem(("vectors", "update"), 3, 9.0, tuple(items))
    every = enumerated(problem)
    best = every.best(problem.capacity)
    assert best is not None
    assert every.steps[best] == 9.0
    bound, found = lower_bound(problem, PLAN), solve(problem)
    assert bound is not None
    assert bound.value == pytest.approx(7.0, rel=1e-4)
    assert found is not None
    assert found.score.step == 9.0


# Whole spaces of small workloads, with every plan counted from its shards.


def load(name: str, rows: int, columns: int, length: float, skew: Skew, order: Order = "hashed") -> TableLoad:
    return TableLoad(se.TableConfig(name, rows, columns), (length,), skew, order, se.optim.Adagrad())


SPACES = {
    "even traffic, an id a sample": (load("a", 4, 4, 1.0, Uniform()), load("b", 8, 3, 1.0, Uniform())),
    "popular rows first": (load("a", 4, 4, 3.0, Zipf(1.2), "sorted"), load("b", 8, 2, 5.0, Zipf(0.8), "sorted")),
    "popular rows anywhere": (load("a", 8, 2, 1.0, Zipf(1.2)), load("b", 4, 4, 1.0, Zipf(1.5))),
    "popular rows nobody knows where": (load("a", 8, 2, 3.0, Zipf(1.2), "unknown"), load("b", 4, 4, 1.0, Zipf(1.5), "unknown")),
    "copies whose rows travel": (load("a", 40_000, 4, 1.0, Uniform()), load("b", 8, 3, 1.0, Uniform())),
    "shares that may be unequal": (load("a", 4, 2, 6.0, Uniform()), load("b", 8, 2, 3.0, Zipf(1.1))),
}


def plans(space: Space, problem: Problem) -> Iterator[Plan]:
    """All plans; of shares in 65,536 parts, a few."""
    whole = [Item(item.name, space.options(number)) for number, item in enumerate(problem.items)]
    problem = replace(problem, items=tuple(whole))
    ways: list[list[Choice]] = []
    for item in whole:
        ways.append([])
        for number, option in enumerate(item.options):
            few = replace(option, divisible=min(option.divisible, 8), sharing=None)
            options = (*item.options[:number], few)
            for choice in choices_of(problem, Item(item.name, options), number):
                scale = option.divisible // few.divisible if option.divisible else 1
                shares = None if choice.shares is None else tuple(share * scale for share in choice.shares)
                ways[-1].append(replace(choice, shares=shares))
                if option.sharing is not None and option.parts == 2:
                    parts = option.sharing.parts
                    ways[-1] += [replace(choice, shares=(part, parts - part)) for part in (parts // 8, parts // 4)]
    for choices in itertools.product(*ways):
        yield space.plan(problem, choices)


def test_rows_are_dealt_out_where_their_order_is_not_known() -> None:
    space = Space(CostModel(Workload("unknown", 64, SPACES["popular rows nobody knows where"]), TWO), planner.Constraints())
    strips = [strip for plan in plans(space, space.problem()) for table in plan.tables for strip in table.layout.strips]
    assert {strip.stride for strip in strips if len(strip.blocks) > 1} >= {2}
    assert all(strip.stride > 1 for strip in strips if len(strip.blocks) > 1)


@pytest.mark.parametrize("room", [None, 1.05], ids=["loose", "tight"])
@pytest.mark.parametrize("name", SPACES)
def test_no_plan_of_a_whole_space_beats_the_bound(name: str, room: float | None) -> None:
    workload = Workload(name, 64, SPACES[name])
    model = CostModel(workload, TWO)
    space = Space(model, planner.Constraints())
    every = [(plan, planner.estimate(plan, workload, TWO, model)) for plan in plans(space, space.problem())]
    assert len(every) > 200
    memory = TWO.memory if room is None else TWO.reserve + int(room * min(found.memory_bytes.max() for _, found in every))
    limited = replace(TWO, memory=memory)
    fitting = {plan.hash: found.step_seconds for plan, found in every if found.memory_bytes.max() <= memory - TWO.reserve}
    planned = planner.plan(workload, limited)
    optimum = min(fitting.values())
    assert planned.lower_bound_seconds is not None
    assert planned.gap is not None
    assert planned.lower_bound_seconds <= optimum * (1 + CLOSE)
    assert planned.estimate.memory_bytes.max() <= memory - TWO.reserve
    assert planned.estimate.step_seconds <= optimum * (1 + planned.gap) * (1 + CLOSE)
    if name != "shares that may be unequal":
        assert fitting[planned.plan.hash] == pytest.approx(planned.estimate.step_seconds, rel=CLOSE)
        assert planned.estimate.step_seconds >= optimum * (1 - CLOSE)


def test_layouts_that_users_fix_are_kept_and_counted_as_plans_are() -> None:
    four = topology.load("cpu", ranks=4)
    tables = [se.TableConfig("a", 1000, 8), se.TableConfig("b", 2000, 16), se.TableConfig("c", 300, 4), se.TableConfig("d", 30, 4)]
    workload = workload_of(tables, 5.0, 64, skew=Zipf(1.1), order="sorted")
    placements = {
        "a": se.row_wise([2, 0], bounds=[7], packing="bag"),
        "b": se.grid(2),
        "c": se.replicated(),
        "d": se.column_wise([1, 1, 3]),
    }
    fixed = resolve(tables, placements, Cluster(4, 2))
    model = CostModel(workload, four)
    space = Space(model, planner.Constraints({table.name: table for table in fixed.tables}))
    problem = space.problem()
    choices = tuple(Choice(0, item.options[0].ranks or ()) for item in problem.items)
    assert space.plan(problem, choices) == fixed
    counted, summed = planner.estimate(fixed, workload, four, model), score(problem, choices)
    np.testing.assert_allclose(summed.loads, counted.seconds, rtol=1e-12)
    np.testing.assert_allclose(summed.memory, counted.memory_bytes, rtol=1e-12)
    some: dict[str, Pin | str | TablePlan] = {table.name: table for table in fixed.tables[:2]}
    found = planner.plan(workload, four, planner.Constraints(some))
    assert found.plan.tables[:2] == fixed.tables[:2]
