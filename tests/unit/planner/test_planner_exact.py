"""The integer program against all solutions of small problems: its bound never exceeds the best, and it finds the best."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardembed.planner.exact import improved
from shardembed.planner.highs import PLAN
from shardembed.planner.problem import Array, Choice, Item, Option, Problem, score
from shardembed.planner.search import Solution
from tests.amount import examples

RANKS, NODE = 4, 2


def placements(option: Option) -> Iterator[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """Every way to place an option."""
    if not option.parts:
        yield (), None
    elif option.ranks is not None:
        yield option.ranks, None
    elif option.divisible:
        for shares in itertools.product(range(option.divisible + 1), repeat=RANKS):
            if sum(shares) == option.divisible:
                held = tuple(rank for rank in range(RANKS) if shares[rank])
                yield held, tuple(shares[rank] for rank in held)
    elif option.node:
        for first in range(0, RANKS, NODE):
            for ranks in itertools.permutations(range(first, first + NODE), option.parts):
                yield ranks, None
    else:
        for ranks in itertools.permutations(range(RANKS), option.parts):
            yield ranks, None


def best_of_all(problem: Problem) -> float:
    """Seconds of the best solution that fits, inf where none does."""
    each = [
        [Choice(number, *place) for number, option in enumerate(item.options) for place in placements(option)]
        for item in problem.items
    ]
    best = np.inf
    for choices in itertools.product(*each):
        found = score(problem, choices)
        if found.memory.max() <= problem.capacity:
            best = min(best, found.step)
    return best


@st.composite
def options(draw: st.DrawFn, phases: int) -> Option:
    def line(parts: int) -> Array:
        return np.array([[draw(st.integers(0, 9)) for _ in range(phases)] for _ in range(parts)], dtype=float).reshape(
            parts, phases
        )

    kind = draw(st.sampled_from(["copied", "whole", "equal", "dealt", "everywhere", "node"]))
    common, size = line(1)[0], float(draw(st.integers(1, 6)))
    charges = frozenset({"cut"} if draw(st.booleans()) else ())
    if kind == "copied":
        return Option(kind, line(0), np.zeros(0), common, size, charges=charges)
    if kind == "equal":
        return Option(kind, np.repeat(line(1), 2, 0), np.repeat(size, 2), common, charges=charges)
    if kind == "dealt":
        return Option(kind, line(1), np.array([size]), common, divisible=2, charges=charges)
    if kind == "everywhere":
        return Option(kind, line(RANKS), np.full(RANKS, size), common, ranks=tuple(range(RANKS)), charges=charges)
    if kind == "node":
        return Option(kind, np.repeat(line(1), NODE, 0), np.repeat(size, NODE), common, node=True, charges=charges)
    return Option(kind, line(1), np.array([size]), common, charges=charges)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    phases = draw(st.integers(1, 2))
    kinds = [tuple(draw(st.lists(options(phases), min_size=1, max_size=2))) for _ in range(2)]
    items = tuple(Item(f"t{i}", kinds[draw(st.integers(0, 1))]) for i in range(2))  # alike, or not
    cut = np.array([float(draw(st.integers(0, 3))) for _ in range(phases)])
    capacity = float(draw(st.integers(4, 14)))
    return Problem(tuple("ab"[:phases]), RANKS, capacity, items, {"cut": cut}, {"cut": 1.0}, np.ones(phases), NODE)


@examples(100)
@given(problems())
def test_the_program_finds_the_best_solution_and_proves_it(problem: Problem) -> None:
    best, found = best_of_all(problem), improved(problem, None, PLAN)
    if best == np.inf:
        assert found is None
        return
    assert found is not None
    assert found.score.memory.max() <= problem.capacity
    assert found.score.step == pytest.approx(score(problem, found.choices).step)
    assert found.bound <= best * (1 + 1e-9)
    assert found.score.step >= best * (1 - 1e-9)
    assert found.score.step <= best * (1 + 1e-3)  # HiGHS may stop that near
    assert found.gap <= 2e-3


def test_a_better_solution_is_kept_and_gets_the_better_bound() -> None:
    whole = Option("whole", np.ones((1, 1)), np.ones(1), np.zeros(1))
    problem = Problem(("a",), 2, 9.0, (Item("x", (whole,)), Item("y", (whole,)), Item("z", (whole,))))
    choices = tuple(Choice(0, (rank,)) for rank in (0, 1, 0))
    kept = improved(problem, Solution(choices, score(problem, choices), 1.5), PLAN)
    assert kept is not None
    assert kept.choices == choices
    assert kept.bound == pytest.approx(2.0, rel=1e-3)  # 3 pieces on 2 ranks: one has 2 of them


def test_a_problem_it_cannot_tell_comes_back_as_it_is() -> None:
    uneven = Option("uneven", np.array([[1.0], [2.0]]), np.ones(2), np.zeros(1))  # which part goes where matters
    problem = Problem(("a",), 2, 9.0, (Item("x", (uneven,)),))
    choices = (Choice(0, (0, 1)),)
    solution = Solution(choices, score(problem, choices), 1.0)
    assert improved(problem, solution, PLAN) is solution
