"""Tables whose ids come and go are planned as tables of as many rows, cut by buckets."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import shardembed as se
from shardembed import planner
from shardembed.errors import PlanError
from shardembed.modules.auto import ask_planner
from shardembed.planner.constraints import Constraints, Pin
from shardembed.planner.cost import CostModel, estimate
from shardembed.planner.cost_demand import SLOT_BYTES
from shardembed.planner.topology import load as load_topology
from shardembed.planner.workload import TableLoad, Uniform, Workload, Zipf
from shardembed.tables.placement import KINDS, Cluster, Placement
from shardembed.tables.plan import Plan, resolve
from shardembed.tables.settings import Settings
from tests.amount import examples
from tests.unit.planner.test_planner_cost import RANKS, topology

CLUSTER = Cluster(RANKS, 2)
PLACEMENTS = [
    se.table_wise(2),
    se.row_wise(),
    se.row_wise(strided=False, packing="bag"),
    se.row_wise((0, 3), bounds=(5,)),
    se.column_wise(),
    se.table_row_wise(1),
    se.grid(2),
]


def load_of(
    rows: int | None, name: str = "t", skew: Uniform | Zipf | None = None, width: int = 16, **settings: object
) -> TableLoad:
    table = se.TableConfig(name, rows, width, **{"dynamic": se.Dynamic(), **settings})  # type: ignore[arg-type]
    return TableLoad(table, (5.0,), skew or Zipf(1.1), "sorted", se.optim.Adam())


def workload_of(*loads: TableLoad) -> Workload:
    return Workload("dynamic", 256, loads)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.kind)
def test_memory_is_that_of_all_places(placement: Placement) -> None:
    """Of a row its weights and state, and in each strip what finds and remembers it."""
    load = load_of(3000)
    workload = workload_of(load)
    plan = resolve([load.table], placement, CLUSTER)
    found = estimate(plan, workload, topology())
    places = load.table.capacity
    assert places == 23 * 131
    strips = len(plan.tables[0].layout.strips)
    assert found.table_memory.sum() == pytest.approx(places * (16 * 4 * 3 + SLOT_BYTES * strips))


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement.kind)
@pytest.mark.parametrize("ids", [700, 3 << 20])
def test_a_table_without_a_limit_takes_the_memory_of_the_ids_that_are_known(placement: Placement, ids: int) -> None:
    load = replace(load_of(None), ids=ids)
    plan = resolve([load.table], placement, CLUSTER)
    found = estimate(plan, workload_of(load), topology())
    strips = len(plan.tables[0].layout.strips)
    assert found.table_memory.sum() == pytest.approx(ids * (16 * 4 * 3 + SLOT_BYTES * strips))
    assert plan.tables[0].num_embeddings == load.table.cut_rows, "it is cut as the job cuts it"


def test_a_table_without_a_limit_is_planned_where_its_ids_fit() -> None:
    tables = [replace(load_of(None, name, width=64), ids=ids) for name, ids in (("few", 100), ("many", 1 << 40))]
    found = planner.plan(workload_of(tables[0]), topology())
    assert found.estimate.table_memory.sum() < 1 << 20
    with pytest.raises(PlanError, match="Table 'many' alone does not: 1,099,511,627,776 x 64"):
        planner.plan(workload_of(*tables), topology())


@examples(40)
@given(
    st.lists(
        st.tuples(st.integers(1, 5000), st.sampled_from(PLACEMENTS), st.sampled_from([Uniform(), Zipf(1.1)])),
        min_size=1,
        max_size=3,
    )
)
def test_a_given_layout_is_an_option_that_costs_what_its_shards_do(drawn: list[tuple[int, Placement, Uniform | Zipf]]) -> None:
    loads = [load_of(rows, f"t{number}", skew) for number, (rows, _, skew) in enumerate(drawn)]
    placed = {}
    for load, (_, placement, _) in zip(loads, drawn, strict=True):
        rows = load.table.cut_rows
        placed[load.table.name] = replace(placement, bounds=(rows // 2,)) if placement.bounds and rows > 1 else placement
        if placement.bounds and rows == 1:
            placed[load.table.name] = se.row_wise()
    plan = resolve([load.table for load in loads], placed, CLUSTER)
    found = planner.plan(workload_of(*loads), topology(), Constraints(pins={table.name: table for table in plan.tables}))
    assert found.plan == plan
    counted = estimate(plan, workload_of(*loads), topology())
    np.testing.assert_array_equal(found.estimate.seconds, counted.seconds)


@pytest.mark.parametrize("rows", [1, 300, 5000, None])
@pytest.mark.parametrize("skew", [Uniform(), Zipf(1.1)], ids=["uniform", "zipf"])
@pytest.mark.parametrize("pooling", ["sum", None])
def test_plans_cut_buckets_and_copy_nothing(rows: int | None, skew: Uniform | Zipf, pooling: str | None) -> None:
    loads = [load_of(rows, "a", skew, pooling=pooling), load_of(rows, "b", skew, pooling=pooling), load_of(900, "c", width=8)]
    found = planner.plan(workload_of(*loads), topology())
    for load, table in zip(loads, found.plan.tables, strict=True):
        assert table.num_embeddings == load.table.cut_rows
        assert not table.layout.copied
    resolve([load.table for load in loads], Plan.from_json(found.plan.to_json()), CLUSTER)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "replicated"])
def test_the_planner_keeps_to_every_kind(kind: str) -> None:
    loads = [load_of(5000, "a"), load_of(5000, "b", pooling=None)]
    found = planner.plan(workload_of(*loads), topology(), Constraints(pins={load.table.name: Pin(kind) for load in loads}))
    for table in found.plan.tables:
        assert table.kind.split(",")[0] == ("row_wise" if kind == "table_row_wise" else kind)


def test_copies_are_refused_by_name() -> None:
    with pytest.raises(PlanError, match="table 't' is pinned replicated, but its ids come and go; pin another kind"):
        planner.plan(workload_of(load_of(500)), topology(), Constraints(pins={"t": Pin("replicated")}))


def test_more_parts_than_buckets_are_refused() -> None:
    with pytest.raises(PlanError, match="'t' is pinned to row_wise in 4 parts, but has 3 buckets and 16 columns"):
        planner.plan(workload_of(load_of(400)), topology(), Constraints(pins={"t": Pin("row_wise", cuts=4)}))


def test_a_plan_for_auto_is_one_of_these_tables() -> None:
    """As rank 0 asks for it."""
    tables = [se.TableConfig("a", 3_000_000, 64, dynamic=se.Dynamic(se.LRU())), se.TableConfig("b", 10_000, 16)]
    optimizers = [se.optim.RowwiseAdagrad()] * 2
    default = resolve(tables, "auto", CLUSTER)
    assert [table.kind for table in default.tables] == ["row_wise", "row_wise"]
    answer = json.loads(ask_planner(tables, optimizers, Settings(), default, frozenset(), CLUSTER, torch.device("cpu")))
    plan = resolve(tables, Plan.from_json(answer["plan"]), CLUSTER)
    assert plan.tables[0].num_embeddings == 3_000_000 // 128


def test_keys_are_ids_of_64_bits() -> None:
    fixed = CostModel(workload_of(replace(load_of(1280), table=se.TableConfig("t", 1280, 16))), topology()).tables[0]
    table = CostModel(workload_of(load_of(1280)), topology()).tables[0]
    whole = np.array([1280.0])
    assert table.key_bytes(table.demand(table.whole, "unique"), whole) == 2 * fixed.key_bytes(
        fixed.demand(fixed.whole, "unique"), whole
    )


def test_what_does_not_fit_is_told_with_its_places() -> None:
    with pytest.raises(PlanError, match="table 'huge'"):
        planner.plan(workload_of(load_of(10**10, "huge", width=64)), load_topology("cpu"))
