"""Plans come from what a user passes, survive their JSON, and refuse what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from shardembed.errors import PlanError
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.placement import Cluster, column_wise, replicated, row_wise, table_wise
from shardembed.tables.plan import REPLICATE_TABLE_BYTES, REPLICATE_TOTAL_BYTES, Plan, TablePlan, default_placements, resolve
from shardembed.tables.table_config import TableConfig
from tests.unit.drawn import Case, cases

TWO = Cluster(2, 2)
BIG, OTHER = TableConfig("big", 1_000_000, 16), TableConfig("other", 500_000, 8)
SMALL = TableConfig("small", 10, 4)


def kinds(plan: Plan) -> dict[str, str]:
    return {table.name: table.kind for table in plan.tables}


def test_auto_copies_small_tables_and_cuts_large_ones() -> None:
    assert kinds(resolve([BIG, SMALL], "auto", TWO)) == {"big": "row_wise", "small": "replicated"}


def test_small_tables_are_copied_up_to_a_total() -> None:
    rows = REPLICATE_TABLE_BYTES // 4
    exact = [TableConfig(f"t{i}", rows, 1) for i in range(20)]
    placed = default_placements(exact)
    copied = [name for name, placement in placed.items() if placement == replicated()]
    assert len(copied) == REPLICATE_TOTAL_BYTES // REPLICATE_TABLE_BYTES == 16
    over = default_placements([TableConfig("t", rows + 1, 1)])
    assert over["t"] == row_wise()
    doubled = default_placements([TableConfig("t", rows, 1, dtype=torch.float64)])
    assert doubled["t"] == row_wise()
    # The smallest come first, wherever they stand.
    assert default_placements([*exact, SMALL])["small"] == replicated()


def test_one_placement_goes_to_every_table() -> None:
    plan = resolve([BIG, SMALL], column_wise(packing="bag"), TWO)
    assert kinds(plan) == {"big": "column_wise", "small": "column_wise"}
    assert [table.packing for table in plan.tables] == ["bag", "bag"]


def test_a_mapping_goes_to_the_tables_it_names() -> None:
    plan = resolve([BIG, OTHER, SMALL], {"other": table_wise(1)}, TWO)
    assert kinds(plan) == {"big": "row_wise", "other": "table_wise", "small": "replicated"}


def test_what_people_call_a_layout() -> None:
    assert resolve([BIG], row_wise(), TWO).tables[0].kind == "row_wise"
    assert resolve([BIG], row_wise(strided=False), TWO).tables[0].kind == "row_wise, blocks"
    layout = Layout(
        4, 4, (Shard(range(4), range(2), (0,)), Shard(range(2), range(2, 4), (0,)), Shard(range(2, 4), range(2, 4), (1,)))
    )
    assert TablePlan("t", layout).kind == "grid"


def test_a_plan_is_put_in_the_collections_order() -> None:
    plan = resolve([BIG, OTHER], row_wise(), TWO)
    assert [table.name for table in resolve([OTHER, BIG], plan, TWO).tables] == ["other", "big"]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("row_wise", r"plan='row_wise': pass 'auto', a Plan \(Plan.load reads a file\), or placements by table name"),
        ({"bgi": row_wise()}, r"the plan names \['bgi'\], which are not tables here; the tables are \['big', 'small'\]"),
        ({"big": "row_wise"}, "table 'big': expected row_wise"),
        ({"small": column_wise([0] * 5)}, "table 'small': 4 columns cannot be cut over 5 ranks"),
        ({"big": table_wise(2)}, r"table 'big' has a shard on rank 2, but the job has 2 rank\(s\)"),
        ({"big": row_wise([0, 5])}, "table 'big' has a shard on rank 5"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(wanted: Any, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        resolve([BIG, SMALL], wanted, TWO)


@pytest.mark.parametrize("wanted", [None, 3, [row_wise()]])
def test_something_that_is_no_plan_is_refused(wanted: Any) -> None:
    with pytest.raises(PlanError, match="pass 'auto'"):
        resolve([BIG], wanted, TWO)


def test_a_plan_for_other_tables_or_ranks_is_refused() -> None:
    plan = resolve([BIG], row_wise(), TWO)
    with pytest.raises(PlanError, match=r"the plan is for 2 rank\(s\), the job has 3"):
        resolve([BIG], plan, Cluster(3, 3))
    with pytest.raises(PlanError, match=r"table 'small' is \(10, 4\) in the model and not there in the plan"):
        resolve([BIG, SMALL], plan, TWO)
    with pytest.raises(PlanError, match="table 'big' is not there in the model"):
        resolve([SMALL], resolve([BIG, SMALL], row_wise(), TWO), TWO)
    with pytest.raises(PlanError, match=r"table 'big' is \(7, 16\) in the model and \(1000000, 16\) in the plan"):
        resolve([TableConfig("big", 7, 16)], plan, TWO)


def test_copies_lie_on_all_ranks_and_are_whole() -> None:
    some = Layout(4, 2, (Shard(range(4), range(2), (0, 1)),))
    with pytest.raises(PlanError, match=r"table 't'.*neither on one rank nor a whole table on all 3"):
        Plan((TablePlan("t", some),), 3)
    parts = Layout(4, 2, (Shard(range(2), range(2), (0, 1)), Shard(range(2, 4), range(2), (0, 1))))
    with pytest.raises(PlanError, match="neither"):
        Plan((TablePlan("t", parts),), 2)
    with pytest.raises(PlanError, match="table 't': packing must be"):
        Plan((TablePlan("t", some, "sorted"),), 2)  # type: ignore[arg-type]


@given(cases())
def test_json_keeps_a_plan(case: Case) -> None:
    again = Plan.from_json(json.loads(json.dumps(case.plan.to_json())))
    assert again == case.plan
    assert again.hash == case.plan.hash


def test_the_hash_sees_every_part() -> None:
    base = resolve([BIG], row_wise(), TWO)
    others = [
        resolve([BIG], wanted, TWO)
        for wanted in (row_wise(packing="bag"), row_wise([1, 0]), row_wise(strided=False), row_wise(bounds=[1]), column_wise())
    ]
    others += [resolve([TableConfig("gib", 1_000_000, 16)], row_wise(), TWO), Plan(base.tables, 3)]
    assert len({plan.hash for plan in [base, *others]}) == len(others) + 1
    assert len(base.hash) == 16


def test_a_saved_plan_loads(tmp_path: Path) -> None:
    plan = resolve([BIG, SMALL], {"big": row_wise(packing="bag")}, TWO)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_a_plan_says_which_rows_its_shards_have(tmp_path: Path) -> None:
    """So one of blocks that was saved when these were the default means blocks for ever."""
    shards = [{"rows": [first, first + 5, 1], "columns": [0, 4], "ranks": [first // 5]} for first in (0, 5)]
    table = {"num_embeddings": 10, "embedding_dim": 4, "packing": "unique", "shards": shards}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"format": 1, "world_size": 2, "tables": {"small": table}}))
    plan = resolve([SMALL], Plan.load(path), TWO)
    assert [shard.rows for shard in plan.tables[0].layout.shards] == [range(0, 5), range(5, 10)]
    assert plan == resolve([SMALL], {"small": row_wise(strided=False)}, TWO)


def spoiled(change: Any) -> str:
    data = resolve([SMALL], row_wise(strided=False), TWO).to_json()
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "Expecting"),
        ("[]", "not a plan of format 1"),
        ("{}", "not a plan of format 1"),
        (spoiled(lambda d: d.update(format=2)), "not a plan of format 1"),
        (spoiled(lambda d: d.pop("world_size")), "incomplete or malformed: KeyError 'world_size'"),
        (spoiled(lambda d: d["tables"]["small"].pop("shards")), "KeyError 'shards'"),
        (spoiled(lambda d: d.update(tables=[])), "malformed"),
        (spoiled(lambda d: d["tables"]["small"]["shards"].pop()), "table has 10"),
        (spoiled(lambda d: d["tables"]["small"].update(packing="x")), "packing must be"),
        (spoiled(lambda d: d["tables"]["small"]["shards"][0].update(rows=[0, 5, 0])), "malformed"),
        (spoiled(lambda d: d["tables"]["small"]["shards"][0].update(ranks=["a"])), "malformed"),
        (spoiled(lambda d: d.update(world_size=1)), "rank 1, but the job has 1"),
        ("\xff\xfe", "utf-8|Expecting"),
    ],
)
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=says) as caught:
        Plan.load(path)
    assert str(path) in str(caught.value)
