"""TorchRec's planning options as a problem of ours: what it says of a plan, we say of it, to the last digit but rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import shardembed as se
from benchmarks.torchrec_child import planned
from benchmarks.torchrec_space import GIB, Space, least_capacity, memory_for
from shardembed.errors import UnsupportedError
from shardembed.planner.problem import Choice, Item, Option, Problem, score
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.table_config import TableConfig

pytest.importorskip("torchrec")

SIZES = ((3, 16, (1.0,)), (1000, 64, (10.0,)), (500_000, 128, (20.0,)), (40_001, 128, (1.0, 30.0)), (1000, 64, (10.0,)))


def space_of(ranks: int, memory: int = 40 * GIB, least_columns: int | None = 32, count: int = len(SIZES)) -> Space:
    tables = [
        TableLoad(TableConfig(f"t{i}", rows, dim, feature_names=[f"t{i}_{j}" for j in range(len(ids))]), ids)
        for i, (rows, dim, ids) in enumerate(SIZES[:count])
    ]
    return Space(Workload("small", 4096, tuple(tables)), ranks, memory, least_columns)


def drawn(space: Space, draw: np.random.Generator) -> tuple[Choice, ...]:
    return tuple(_drawn_choice(item, space.ranks, draw) for item in space.problem.items)


def _drawn_choice(item: Item, ranks: int, draw: np.random.Generator) -> Choice:
    number = int(draw.integers(len(item.options)))
    option = item.options[number]
    if option.divisible:
        owners = draw.integers(ranks, size=option.divisible).tolist()
        return Choice(number, tuple(sorted(set(owners))), tuple(owners.count(rank) for rank in sorted(set(owners))))
    if option.ranks is not None:
        return Choice(number, option.ranks)
    if option.node:
        first = 8 * int(draw.integers(ranks // 8))
        return Choice(number, tuple(range(first, first + 8)))
    return Choice(number, tuple(draw.permutation(ranks)[: option.parts].tolist()))


@pytest.mark.parametrize("ranks", [2, 8, 32])
def test_a_plan_scores_what_torchrec_rates_it(ranks: int) -> None:
    space, draw = space_of(ranks), np.random.default_rng(ranks)
    for _ in range(10):
        choices = drawn(space, draw)
        counted, assigned = score(space.problem, choices), space.assigned(choices)
        rating, fits = space.rate(assigned)
        assert counted.step * 1e3 == pytest.approx(rating, rel=1e-12)
        assert fits == (counted.memory.max() <= space.capacity)
        stored = np.zeros(ranks)
        for option in space.proposal(assigned):
            for shard in option.shards:
                stored[shard.rank] += shard.storage.hbm
        np.testing.assert_allclose(counted.memory, stored)


@pytest.mark.parametrize("ranks", [8, 32])
def test_a_plan_is_the_same_after_a_round_trip(ranks: int) -> None:
    space, draw = space_of(ranks), np.random.default_rng(1)
    for _ in range(10):
        assigned = space.assigned(drawn(space, draw))
        again = space.assigned(space.choices(assigned))
        assert {name: (kind, sorted(held)) for name, (kind, held) in again.items()} == {
            name: (kind, sorted(held)) for name, (kind, held) in assigned.items()
        }
        plan = space.plan(assigned, dict.fromkeys(assigned, "bag"))  # a layout refuses shards that do not tile its table
        for table in plan.tables:
            kind, held = assigned[table.name]
            assert table.layout.copied == (kind == "data_parallel")
            assert table.layout.ranks <= set(held)


def test_all_kinds_that_both_have_are_listed_and_none_twice() -> None:
    keys = {item.name: [option.key for option in item.options] for item in space_of(16).problem.items}
    assert keys["t0"] == ["data_parallel", "table_wise", "row_wise", "table_row_wise"]  # 16 columns: one column shard is no cut
    assert set(keys["t1"]) == {"data_parallel", "table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard"}
    assert "grid_shard" not in keys["t2"]  # four column shards want four nodes; there are two
    assert "column_wise" not in {option.key for item in space_of(16, least_columns=None).problem.items for option in item.options}


def test_equal_tables_share_their_options() -> None:
    items = space_of(8).problem.items
    assert items[1].options is items[4].options
    assert items[1].options is not items[2].options


def test_the_state_of_a_tables_optimizer_takes_memory() -> None:
    space = space_of(2)
    load = space.workload.tables[2]
    held = {}
    for optimizer in (se.optim.SGD(lr=0.1), se.optim.RowwiseAdagrad(), se.optim.Adagrad(), se.optim.Adam()):
        one = Space(Workload("one", 4096, (replace(load, optimizer=optimizer),)), 2, space.memory)
        held[type(optimizer)] = next(o.memory[0] for o in one.problem.items[0].options if o.key == "table_wise")
    weights, rows = 500_000 * 128 * 4, 500_000
    beside = [held[kind] - held[se.optim.SGD] for kind in (se.optim.RowwiseAdagrad, se.optim.Adagrad, se.optim.Adam)]
    assert beside == [rows * 4, weights, 2 * weights]
    with pytest.raises(UnsupportedError, match="FTRL"):
        _ = Space(Workload("one", 4096, (replace(load, optimizer=se.optim.FTRL()),)), 2, space.memory).module


def test_torchrecs_own_plan_is_a_plan_of_the_problem() -> None:
    space = space_of(8, count=3)  # its grid search tries all combinations of few tables
    found = planned(space, 60.0)
    assert found.assigned is not None, found.error
    assert not found.stopped
    rating, fits = space.rate(found.assigned)
    counted = score(space.problem, space.choices(found.assigned))
    assert counted.step * 1e3 == pytest.approx(rating)
    assert fits
    assert counted.memory.max() <= space.capacity


def test_a_plan_that_does_not_fit_is_said_to_be_none() -> None:
    found = planned(space_of(8, memory=1_000_000, count=2), 60.0)
    assert found.assigned is None
    assert found.error


def test_memory_for_a_capacity_leaves_it_after_torchrecs_reservation() -> None:
    space = space_of(8)
    smaller = space_of(8, memory_for(space, 3e9))
    assert smaller.capacity == pytest.approx(3e9, rel=1e-6)


def test_below_the_least_capacity_nothing_fits() -> None:
    whole, halves = np.array([6.0]), np.array([4.0, 4.0])
    options = (Option("one", np.ones((1, 1)), whole, np.zeros(1)), Option("two", np.ones((2, 1)), halves, np.zeros(1)))
    copied = (Option("copied", np.zeros((0, 1)), np.zeros(0), np.ones(1), common_memory=1.0),)
    problem = Problem(("step",), 4, 9.0, (Item("a", options), Item("b", options), Item("c", copied)))
    assert least_capacity(problem) == pytest.approx(5.0, rel=1e-3)  # at 4, only halves: 2 * 8 + 4 > 4 * 4, at 5 they fit
