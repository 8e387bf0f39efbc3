"""`plan="auto"` on several ranks: rank 0 plans, all have its plan, and nobody waits for a rank that was given something else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

import shardembed as se
from shardembed import errors
from shardembed.modules import auto
from shardembed.planner.cost import estimate
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import resolve
from shardembed.tables.settings import Settings
from tests.harness import run_ranks

TABLES = [se.TableConfig("item", 40, 4), se.TableConfig("user", 30, 6, pooling=None)]
LAST = {"item": se.table_wise(1, packing="bag"), "user": se.column_wise()}


def answer(tables: Any, *_: Any) -> str:
    """In the planner's place: another plan than the default one."""
    return json.dumps({"plan": resolve(tables, LAST, Cluster(2, 2)).to_json()})


def refuse(*_: Any) -> str:
    return json.dumps({"error": "table 'item' needs 3 GiB, each rank has 1"})


def fail(*_: Any) -> str:
    raise AssertionError("the planner was asked")


@contextmanager
def planner(rank: int, planned: Any, tiny: int = 0) -> Iterator[None]:
    """Only rank 0 may ask it."""
    with patch.object(auto, "ask_planner", planned if rank == 0 else fail), patch.object(auto, "TINY", tiny):
        yield


def build(plan: Any = "auto", tables: Any = TABLES) -> se.EmbeddingCollection:
    return se.EmbeddingCollection(tables, plan=plan, optimizer=se.optim.Adagrad())


def make(rank: int, world_size: int) -> tuple[str, dict[str, str], dict[str, int], float]:
    tally = build(se.row_wise()).journey.comm.tally
    tally.clear()
    with planner(rank, answer):
        emb = build()
    calls = tally.operations()
    out = emb({"item": torch.arange(3), "user": torch.arange(4)})
    return emb.plan.hash, {table.name: table.kind for table in emb.plan.tables}, calls, float(out["user"].sum())


def test_every_rank_has_rank_zeros_plan() -> None:
    one, other = run_ranks(2, make)
    assert one == other
    assert one[1] == {"item": "table_wise", "user": "column_wise"}


def test_making_a_collection_costs_the_documented_calls() -> None:
    assert run_ranks(2, make)[0][2] == {"all_to_all": 5, "broadcast": 2}
    assert run_ranks(2, make_small)[0] == ({"all_to_all": 3}, {"item": "replicated", "user": "replicated"})


def make_small(rank: int, world_size: int) -> tuple[dict[str, int], dict[str, str]]:
    tally = build(se.row_wise()).journey.comm.tally
    tally.clear()
    with planner(rank, fail, auto.TINY):
        emb = build()
    return tally.operations(), {table.name: table.kind for table in emb.plan.tables}


def make_alone(rank: int, world_size: int) -> int:
    with planner(rank, fail):
        return build().plan.world_size


def test_one_rank_has_nothing_to_plan() -> None:
    assert run_ranks(1, make_alone) == [1]


def hear_refusal(rank: int, world_size: int) -> str:
    with planner(rank, refuse), pytest.raises(errors.PlanError) as caught:
        build()
    assert build(se.row_wise()).rows("item", torch.arange(2)).shape == (2, 4), "the ranks are out of step"
    return str(caught.value)


def test_a_plan_that_does_not_fit_is_refused_on_every_rank() -> None:
    found = run_ranks(2, hear_refusal)
    assert found[0] == found[1]
    assert found[0].startswith("table 'item' needs 3 GiB, each rank has 1\n")
    assert "plan=se.row_wise()" in found[0]


def build_something_else(rank: int, world_size: int) -> list[str]:
    """Rank 1 builds each of these while rank 0 leaves everything to the planner."""
    others = {
        "a plan of its own": lambda: build(se.replicated()),
        "the default plan, but given": lambda: build(resolve(TABLES, "auto", Cluster(2, 2))),
        "another table": lambda: build(tables=[TABLES[0], se.TableConfig("user", 31, 6, pooling=None)]),
        "a part of it": lambda: build({"item": se.row_wise()}),
        "a plan for no table": lambda: build({"itm": se.row_wise()}),
    }
    said = []
    for other in others.values():
        with planner(rank, answer), pytest.raises((errors.DisagreementError, errors.PlanError)) as caught:
            other() if rank else build()
        said.append(str(caught.value))
    assert build(se.row_wise()).rows("item", torch.arange(2)).shape == (2, 4), "the ranks are out of step"
    return said


def test_ranks_that_are_given_other_plans_hear_so() -> None:
    given, default, table, part, unknown = run_ranks(2, build_something_else)[0]
    assert 'plan="auto"' in given
    assert 'plan="auto"' in default
    assert "table 'user': 30 x 6" in table
    assert "table 'user': 31 x 6" in table
    assert "table 'item': row_wise" in part
    assert "the plan names ['itm']" in unknown


def test_what_is_left_to_the_planner_decides_whether_it_is_asked() -> None:
    large = [se.TableConfig("large", 10**7, 64), TABLES[0]]
    two = Cluster(2, 2)
    assert auto.wants_planning(large, "auto", two)
    assert auto.wants_planning(large, {"item": se.row_wise()}, two)
    assert not auto.wants_planning(large, {"item": se.row_wise(), "large": se.row_wise()}, two)
    assert not auto.wants_planning(large, se.row_wise(), two)
    assert not auto.wants_planning(large, "auto", Cluster(1, 1))
    assert not auto.wants_planning(TABLES, "auto", two)


def test_the_planner_is_told_how_features_are_read() -> None:
    tables = [se.TableConfig("t", 10, 4, feature_names=["a", "b"], pooling={"a": "sum", "b": None})]
    load = auto.workload_of(tables, [se.optim.Adam()], Settings(), 4)
    assert load.global_batch_size == 4 * auto.BATCH
    assert load.tables[0].ids_per_sample == (auto.IDS_A_BAG, auto.IDS_A_LOOKUP)
    assert load.tables[0].optimizer == se.optim.Adam()


def ask_for_real(rank: int, world_size: int) -> tuple[str, dict[str, str], float]:
    """The planner itself, on two ranks, with one table placed by hand."""
    tables = [se.TableConfig("item", 3000, 8), se.TableConfig("user", 2000, 8), se.TableConfig("word", 500, 16)]
    with patch.object(auto, "TINY", 0):
        emb = se.EmbeddingCollection(tables, plan={"user": se.column_wise([1, 0])}, optimizer=se.optim.Adagrad())
    out = emb({table.name: torch.tensor([[1, 2], [3, 3]]) for table in tables})
    return emb.plan.hash, {table.name: table.kind for table in emb.plan.tables}, float(out["user"].sum())


def test_the_planner_keeps_to_what_is_placed_by_hand() -> None:
    one, other = run_ranks(2, ask_for_real)
    assert one == other
    assert one[1]["user"] == "column_wise"


def test_a_plan_is_never_slower_than_the_default_one() -> None:
    tables = [se.TableConfig(f"t{i}", 1000 * (i + 1), 8) for i in range(4)]
    optimizers, settings, cluster = [se.optim.SGD()] * 4, Settings(), Cluster(4, 4)
    default = resolve(tables, "auto", cluster)
    work, machine = auto.workload_of(tables, optimizers, settings, 4), auto.topology_of(cluster, torch.device("cpu"))
    text = auto.ask_planner(tables, optimizers, settings, default, frozenset(), cluster, torch.device("cpu"))
    found = se.Plan.from_json(json.loads(text)["plan"])
    assert estimate(found, work, machine).step_seconds <= estimate(default, work, machine).step_seconds


def test_what_does_not_fit_into_memory_is_told_as_text() -> None:
    tables, cluster = [se.TableConfig("huge", 10**12, 64)], Cluster(2, 2)
    default = resolve(tables, "auto", cluster)
    text = auto.ask_planner(tables, [se.optim.SGD()], Settings(), default, frozenset(), cluster, torch.device("cpu"))
    assert "huge" in json.loads(text)["error"]
