"""Many tables: what is listed of them stands for all that there is, and what is moved about stays a solution."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardembed import planner
from shardembed.optim import Adagrad, RowwiseAdagrad
from shardembed.planner import space, topology
from shardembed.planner.bound import lower_bound
from shardembed.planner.classes import within
from shardembed.planner.cost_model import CostModel
from shardembed.planner.highs import PLAN, Effort
from shardembed.planner.level import CLASSES, level
from shardembed.planner.problem import Array, Choice, Item, Option, Problem, score
from shardembed.planner.search import solve
from shardembed.planner.smooth import smooth
from shardembed.planner.space import Space
from shardembed.planner.state import State
from shardembed.planner.workload import TableLoad, Uniform, Workload, Zipf
from shardembed.tables.table_config import TableConfig
from tests.amount import examples

CLOSE = 1e-9
LISTINGS = {"all": (40, 0.1), "some": (0, -1.0), "light": (0, np.inf)}  # MOST_KINDS, HEAVY


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    optimizer: Any = draw(st.sampled_from([Adagrad(), RowwiseAdagrad()]))
    loads = []
    for number in range(draw(st.integers(1, 4))):
        rows, width = draw(st.sampled_from([3, 40, 5000, 10**6])), draw(st.sampled_from([2, 3, 8, 64]))
        skew = draw(st.sampled_from([Uniform(), Zipf(0.6), Zipf(1.2)]))
        order: Any = draw(st.sampled_from(["hashed", "sorted", "unknown"]))
        pooling: Any = draw(st.sampled_from(["sum", "mean", "max", None]))
        ids = tuple(draw(st.sampled_from([1.0, 3.0, 20.0])) for _ in range(draw(st.integers(1, 2))))
        names = tuple(f"f{number}_{feature}" for feature in range(len(ids)))
        loads.append(TableLoad(TableConfig(f"t{number}", rows, width, names, pooling), ids, skew, order, optimizer))
    return Workload("drawn", draw(st.sampled_from([64, 4096])), tuple(loads))


def problem_of(workload: Workload, machines: topology.Topology, listing: str) -> Problem:
    with pytest.MonkeyPatch.context() as patch:
        kinds, heavy = LISTINGS[listing]
        patch.setattr(space, "MOST_KINDS", kinds)
        patch.setattr(space, "HEAVY", heavy)
        return Space(CostModel(workload, machines), planner.Constraints()).problem()


@examples(20)
@given(workloads(), st.sampled_from([("h100x8", 4), ("h100x8", 9), ("cpu", 2)]))
def test_a_shorter_list_has_a_lower_bound_and_plans_that_keep_both(workload: Workload, machines: tuple[str, int]) -> None:
    here = topology.load(machines[0]).scaled(machines[1])
    found: dict[str, float] = {}
    for listing in LISTINGS:
        problem = problem_of(workload, here, listing)
        bound = lower_bound(problem, PLAN)
        assert bound is not None
        assert bound.value is not None
        found[listing] = bound.value
        solution = solve(problem, 0, Effort(rounds=5))
        assert solution is not None
        own = solution.problem or problem
        again = score(own, solution.choices)
        assert again.step == solution.score.step
        assert again.memory.max() <= own.capacity
        assert bound.value <= again.step * (1 + CLOSE)
        # No bound of a shorter list passes what a longer one finds, nor the other way round.
        found[f"{listing} step"] = again.step
    for listing in ("some", "light"):
        assert found[listing] <= min(found[f"{other} step"] for other in LISTINGS) * (1 + CLOSE)
        assert found[listing] <= found["all"] * (1 + 2 * PLAN.near)  # each may stop so far from its best


@examples(20)
@given(workloads(), st.sampled_from([2, 9, 64]))
def test_tables_counted_together_cost_what_each_costs_alone(workload: Workload, ranks: int) -> None:
    here = topology.load("h100x8").scaled(ranks)
    alone, together = (problem_of(workload, here, listing) for listing in ("all", "light"))
    for one, other in zip(alone.items, together.items, strict=True):
        options = {str(option.key): option for option in one.options}
        for option in other.options:
            if str(option.key) not in options:
                continue  # another one is no worse, in a longer list
            same = options[str(option.key)]
            np.testing.assert_allclose(option.loads, same.loads, rtol=CLOSE)
            np.testing.assert_allclose(option.memory, same.memory, rtol=CLOSE)
            np.testing.assert_allclose(option.common, same.common, rtol=CLOSE)
            assert option.common_memory == pytest.approx(same.common_memory, rel=CLOSE)
            assert (option.charges, option.divisible) == (same.charges, same.divisible)


@examples(40)
@given(st.integers(0, 2**32 - 1))
def test_moves_and_swaps_even_ranks_out_and_keep_parts_apart(seed: int) -> None:
    draw = np.random.default_rng(seed)
    ranks, phases = int(draw.integers(2, 7)), int(draw.integers(1, 4))
    items = []
    for number in range(int(draw.integers(3, 20))):
        parts = int(draw.integers(1, ranks))
        option = Option(None, draw.random((parts, phases)), draw.random(parts), np.zeros(phases))
        items.append(Item(f"item {number}", (option,)))
    total = sum(float(item.options[0].memory.sum()) for item in items)
    problem = Problem(tuple("abc"[:phases]), ranks, 2.0 * total / ranks + 1.0, tuple(items))
    targets = np.sum([item.options[0].total for item in items], axis=0) / ranks
    state = State(problem, targets)
    for item in range(len(items)):
        if not state.insert(item, 0):
            return

    def power() -> float:
        return float((((state.loads / state.scale) ** 16) @ state.scale).sum())

    before = power()
    smooth(state, 1e6)
    assert power() <= before * (1 + CLOSE)
    choices = tuple(choice for choice in state.choices if choice is not None)
    assert all(len(set(choice.ranks)) == len(choice.ranks) for choice in choices)
    counted = score(problem, choices)
    np.testing.assert_allclose(counted.loads.T, state.loads, rtol=1e-9, atol=1e-12)
    assert counted.memory.max() <= problem.capacity


def test_what_is_alike_lies_level_after_moves() -> None:
    option = Option(None, np.ones((1, 1)), np.ones(1), np.zeros(1))
    problem = Problem(("a",), 4, 100.0, tuple(Item(f"item {number}", (option,)) for number in range(8)))
    state = State(problem, np.array([2.0]))
    for item in range(8):
        state.restore(item, Choice(0, (0,)))
    smooth(state, 1e6)
    assert state.loads.max() == 2.0


@examples(40)
@given(st.integers(0, 2**32 - 1))
def test_a_mixture_is_dealt_out_so_that_ranks_of_a_class_end_level(seed: int) -> None:
    draw = np.random.default_rng(seed)
    class_of = np.append(np.arange(3), draw.integers(0, 3, 20))
    base, mixture = draw.random((23, 1)), 1.0 + draw.random((3, 1))
    part = within(base, mixture, np.ones(1), class_of)
    assert (part >= 0).all()
    ends = base[:, 0] + part * mixture[class_of, 0]
    for number in range(3):
        mine = class_of == number
        assert part[mine].mean() == pytest.approx(1.0)
        got = mine & (part > 1e-9)
        np.testing.assert_allclose(ends[got], ends[got][0], rtol=1e-6)
        assert (base[mine & ~got, 0] >= ends[got][0] * (1 - 1e-6)).all()


def test_more_kinds_of_ranks_than_a_program_tells_apart_come_level() -> None:
    draw = np.random.default_rng(3)
    ranks = 2 * CLASSES + 50
    fixed = [
        Option(None, line[None], np.array([line[0]]), np.zeros(2), ranks=(rank,))
        for rank, line in enumerate(draw.random((ranks, 2)))
    ]
    shared = Option(None, np.array([[1.5 * ranks, 1.5 * ranks]]), np.array([1.0 * ranks]), np.zeros(2), divisible=1 << 16)
    items = tuple(Item(f"item {number}", (option,)) for number, option in enumerate([*fixed, shared]))
    problem = Problem(("a", "b"), ranks, 2.5, items)
    state = State(problem, np.array([2.0, 2.0]))
    assert all(state.insert(item, 0) for item in range(len(items)))
    done = level(state, PLAN)
    assert done is not None
    counted = score(problem, tuple(choice for choice in done.choices if choice is not None))
    assert counted.memory.max() <= problem.capacity
    # One mixture cannot level two phases that differ from rank to rank: at best each rank stands out in one of them.
    best = value_of_one_mixture(np.array([option.loads[0] for option in fixed]), 1.5 * ranks)
    assert counted.step <= best * 1.01


def value_of_one_mixture(base: Array, amount: float) -> float:
    """The least sum of two limits, below which there is room for so much of an item that weighs alike on both phases."""
    found = np.inf
    for first in np.linspace(1.0, 4.0, 301):
        low, high = 1.0, 4.0
        for _ in range(40):
            middle = (low + high) / 2
            room = np.minimum(first - base[:, 0], middle - base[:, 1])
            low, high = (low, middle) if room.min() >= 0 and room.sum() >= amount else (middle, high)
        found = min(found, first + high) if high < 4.0 - 1e-9 else found
    return float(found)


@pytest.mark.exhaustive
def test_the_same_bits_whatever_threads_there_are() -> None:
    program = (
        "from benchmarks.drawn import drawn; from shardembed.planner import plan, topology, Effort;"
        "one = drawn(21, topology.load('h100x8'));"
        "found = plan(one.workload, one.topology, effort=Effort(rounds=20));"
        "print(found.plan.hash, found.lower_bound_seconds.hex(), found.estimate.step_seconds.hex())"
    )
    said = set()
    for threads in ("1", "4"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HIGHS_THREADS")
        environment: dict[str, Any] = {**os.environ, **dict.fromkeys(names, threads)}
        ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        said.add(ran.stdout)
    assert len(said) == 1
    assert said.pop().strip()
