"""Wishes for the plan: read from texts and from code, answered to the planner, refused where they cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from shardembed.errors import PlanError
from shardembed.planner import topology
from shardembed.planner.constraints import Constraints, Pin
from shardembed.planner.workload import workload_of
from shardembed.tables.placement import KINDS, Cluster, row_wise
from shardembed.tables.plan import resolve
from shardembed.tables.table_config import TableConfig

TABLES = [
    TableConfig("cat_0", 100, 8),
    TableConfig("cat_1", 100, 8),
    TableConfig("history", 100, 8, pooling=None),
    TableConfig("capped", 3, 8, max_norm=1.0),
    TableConfig("freq", 100, 2, scale_grad_by_freq=True),
    TableConfig("both", 100, 8, ["x", "y"], {"x": "sum", "y": None}),
]
WORKLOAD = workload_of(TABLES, 2.0, 64)
FOUR = topology.load("cpu", ranks=4)


def check(pins: Sequence[str] = (), forbid: Sequence[str] = ()) -> Constraints:
    found = Constraints.parse(pins, forbid)
    found.check(WORKLOAD, FOUR)
    return found


def allowed(found: Constraints, table: str, packing: str | None = None) -> set[str]:
    return {kind for kind in KINDS if found.allowed(table, kind, packing)}


def test_without_wishes_everything_is_allowed() -> None:
    found = check()
    assert allowed(found, "cat_0") == allowed(found, "cat_0", "bag") == set(KINDS)
    assert (found.ranks("cat_0"), found.cuts("cat_0"), found.fixed("cat_0"), found.tables) == (None, None, None, frozenset())


@pytest.mark.parametrize(
    ("wish", "pin", "kinds"),
    [
        ("row_wise", Pin("row_wise"), {"row_wise"}),
        ("row_wise:4", Pin("row_wise", cuts=4), {"row_wise"}),
        ("column_wise@1,0", Pin("column_wise", ranks=(1, 0)), {"column_wise"}),
        ("table_wise:3", Pin("table_wise", ranks=(3,)), {"table_wise"}),
        ("table_wise@3", Pin("table_wise", ranks=(3,)), {"table_wise"}),
        ("cuts:2", Pin(cuts=2), set(KINDS) - {"replicated"}),
        ("ranks:2,3", Pin(ranks=(2, 3)), set(KINDS) - {"replicated"}),
        ("packing:bag", Pin(packing="bag"), set(KINDS) - {"replicated"}),
        ("packing:unique", Pin(packing="unique"), set(KINDS)),
        ("replicated", Pin("replicated"), {"replicated"}),
    ],
)
def test_a_wish_is_read_and_answered(wish: str, pin: Pin, kinds: set[str]) -> None:
    found = check([f"cat_0={wish}"])
    assert found.pins == Constraints({"cat_0": wish}).pins == {"cat_0": pin}
    assert allowed(found, "cat_0") == kinds
    assert (found.ranks("cat_0"), found.cuts("cat_0")) == (pin.ranks, pin.cuts)
    assert allowed(found, "cat_1") == set(KINDS)
    assert found.tables == {"cat_0"}


def test_packing_is_held_to_its_wish() -> None:
    found = check(["cat_0=packing:bag", "both=packing:bag"])
    assert "row_wise" in allowed(found, "cat_0", "bag")
    assert allowed(found, "cat_0", "unique") == set()


def test_wishes_for_one_table_add_up() -> None:
    found = check(["cat_0=row_wise", "cat_0=packing:bag", "cat_0=cuts:2", "cat_0=ranks:0,1", "cat_0=row_wise"])
    assert found.pins["cat_0"] == Pin("row_wise", 2, (0, 1), "bag")


def test_kinds_are_forbidden_for_one_or_for_all() -> None:
    found = check(forbid=["replicated", "cat_1=column_wise"])
    assert allowed(found, "cat_0") == set(KINDS) - {"replicated"}
    assert allowed(found, "cat_1") == set(KINDS) - {"replicated", "column_wise"}
    assert found.tables == {"cat_1"}


def test_a_layout_can_be_fixed_as_it_is() -> None:
    plan = resolve([TABLES[0]], row_wise([2, 0], bounds=[7]), Cluster(4, 4)).tables[0]
    found = Constraints({"cat_0": plan})
    found.check(WORKLOAD, FOUR)
    assert found.fixed("cat_0") == plan
    with pytest.raises(PlanError, match="table 'cat_0' is pinned to a layout with rank 2, but there are 2 ranks"):
        found.check(WORKLOAD, FOUR.scaled(2))
    with pytest.raises(PlanError, match="table 'freq' is pinned to a layout of 100 x 8, but is 100 x 2"):
        Constraints({"freq": plan}).check(WORKLOAD, FOUR)
    with pytest.raises(PlanError, match="table 'cat_0' is pinned to row_wise, which is forbidden for all tables"):
        Constraints({"cat_0": plan}, ["row_wise"])


@pytest.mark.parametrize(
    ("pins", "forbid", "says"),
    [
        (["cat_0"], [], "--pin cat_0: write it as TABLE=WISH, the wish being a kind"),
        (["=row_wise"], [], "write it as TABLE=WISH"),
        (["cat_0=rowwise"], [], "table 'cat_0' cannot be pinned to 'rowwise'; did you mean 'row_wise'?; write a kind"),
        (["cat_0=row_wise:many"], [], "table 'cat_0' cannot be pinned to 'row_wise:many': 'many' is not a number"),
        (["cat_0=row_wise:1,2"], [], "a number of cuts is one number; ranks are named like row_wise@0,1"),
        (["cat_0=packing:bags"], [], "'bags' is not one of unique, bag; did you mean 'bag'?"),
        (["cat_0=row_wise", "cat_0=grid"], [], "table 'cat_0' is pinned to kind row_wise and to kind grid; keep one"),
        (["cat_0=table_wise:0", "cat_0=table_wise:1"], [], "is pinned to ranks 0 and to ranks 1; keep one"),
        (["cat_0=cuts:2", "cat_0=ranks:0,1,2"], [], "is pinned to 2 cuts and to 3 rank(s) (0, 1, 2); name a rank a cut"),
        (["cat_0=row_wise@1,1"], [], "is pinned to ranks 1, 1; name at least one rank, each once"),
        (["cat_0=row_wise@0,-1"], [], "is pinned to ranks 0, -1; name at least one rank, each once"),
        (["cat_0=row_wise@1"], [], "is pinned to row_wise in 1 part(s); cut it into two or more, or pin it table_wise"),
        (["cat_0=cuts:0"], [], "is pinned to cuts in 0 part(s)"),
        (
            ["cat_0=table_wise:0,1"],
            [],
            "is pinned table_wise, which is one part on one rank, and to 2; pin row_wise or column_wise",
        ),
        (["cat_0=replicated:2"], [], "is pinned replicated, which is whole on every rank, and to cuts or ranks"),
        (["cat_0=replicated", "cat_0=packing:bag"], [], "is pinned replicated, which sends no ids, and to packing 'bag'"),
        (["cat_0=row_wise"], ["row_wise"], "table 'cat_0' is pinned to row_wise, which is forbidden for all tables; take back one"),
        (["cat_0=row_wise"], ["cat_0=row_wise"], "table 'cat_0' is pinned to row_wise, which is forbidden for it; take back one"),
        ([], ["column"], "--forbid column: 'column' is not one of table_wise, row_wise"),
        (
            [],
            ["cat_0=row-wise"],
            "'row-wise' is not one of table_wise, row_wise, column_wise, table_row_wise, grid, replicated; did",
        ),
        ([], KINDS, "table 'cat_0': every kind is forbidden; allow at least one of"),
        ([], [f"cat_1={kind}" for kind in KINDS], "table 'cat_1': every kind is forbidden"),
        (["cat_9=row_wise"], [], "table 'cat_9' is constrained, but not there; did you mean 'cat_"),
        ([], ["hist=row_wise"], "table 'hist' is constrained, but not there; did you mean 'history'? (the workload has 6 tables"),
        (["cat_0=table_wise:4"], [], "table 'cat_0' is pinned to rank 4, but there are 4 ranks, 0 to 3; name one of them"),
        (["cat_0=row_wise:5"], [], "table 'cat_0' is pinned to row_wise in 5 parts, but there are 4 ranks; a rank holds one part"),
        (
            ["freq=column_wise:4"],
            [],
            "'freq' is pinned to column_wise in 4 parts, but has 100 rows and 2 columns; cut it into fewer",
        ),
        (["capped=row_wise:4"], [], "'capped' is pinned to row_wise in 4 parts, but has 3 rows and 8 columns"),
        (["history=packing:bag"], [], "'history' is pinned to packing 'bag', but is read by id: pooling None needs every vector"),
        (["capped=packing:bag"], [], "is read by id: max_norm looks at each row of a batch once; pin packing 'unique'"),
        (["freq=packing:bag"], [], "is read by id: scale_grad_by_freq counts each id of a batch"),
        (["freq=replicated"], [], "'freq' is pinned replicated, but max_norm and scale_grad_by_freq need the ids of all ranks"),
    ],
)
def test_what_cannot_be_had_is_refused(pins: Sequence[str], forbid: Sequence[str], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        check(pins, forbid)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("pins", "says"),
    [
        ({"cat_0": Pin("row-wise")}, "table 'cat_0' is pinned to 'row-wise', which is no kind; did you mean 'row_wise'?"),
        ({"cat_0": Pin(packing="bags")}, "table 'cat_0' is pinned to packing 'bags'"),  # type: ignore[arg-type]
        ({"cat_0": Pin(ranks=())}, "name at least one rank"),
    ],
)
def test_pins_made_in_code_are_held_to_the_same(pins: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        Constraints(pins)
    assert says in str(caught.value)


def test_names_may_hold_an_equals_sign() -> None:
    assert Constraints.parse(["a=b=row_wise"], ["a=b=grid"]).tables == {"a=b"}
