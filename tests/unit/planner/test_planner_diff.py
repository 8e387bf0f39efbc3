"""Two plans beside each other: what changed, and how many bytes have to come to ranks that do not hold them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardembed.config.console import console_for
from shardembed.planner import diff, report
from shardembed.tables.layout import Layout
from shardembed.tables.placement import Cluster, Placement, column_wise, grid, replicated, row_wise, table_wise
from shardembed.tables.plan import Plan, TablePlan
from tests.unit.planner.planned import plan_of, workload

ROWS, COLUMNS = 24, 6


def plan(ranks: int, **tables: Placement) -> Plan:
    cluster = Cluster(ranks, 2)
    return Plan(tuple(TablePlan(n, p.layout(ROWS, COLUMNS, cluster), p.packing or "unique") for n, p in tables.items()), ranks)


def held(layout: Layout, ranks: int) -> np.ndarray:
    """Which elements each rank holds, one by one."""
    found = np.zeros((ranks, layout.num_embeddings, layout.embedding_dim), bool)
    for shard in layout.shards:
        for rank in shard.ranks:
            found[rank][np.ix_(list(shard.rows), list(shard.columns))] = True
    return found


ranges = st.builds(range, st.integers(0, 30), st.integers(0, 60), st.integers(1, 9))


@given(ranges, ranges)
def test_what_two_ranges_share_is_counted_without_listing_them(one: range, other: range) -> None:
    assert diff.common(one, other) == len(set(one) & set(other))


def test_long_ranges_are_counted_at_once() -> None:
    assert diff.common(range(0, 10**12, 7), range(3, 10**12, 11)) == len(range(14, 10**12, 77))


KINDS = [
    table_wise(0),
    table_wise(1),
    row_wise(),
    row_wise(strided=False),
    row_wise([1, 0, 2], bounds=[5, 11]),
    column_wise([2, 0]),
    grid(2, [0, 1, 2, 3]),
    replicated(),
]


@pytest.mark.parametrize("old", KINDS, ids=lambda placement: placement.kind)
@pytest.mark.parametrize("new", KINDS, ids=lambda placement: placement.kind)
def test_bytes_that_move_are_those_a_rank_did_not_hold(old: Placement, new: Placement) -> None:
    before, after = plan(4, t=old), plan(4, t=new)
    found = diff.compare(before, after, {"t": 2})
    was, now = (held(each.tables[0].layout, 4) for each in (before, after))
    assert found.arriving.tolist() == (2 * (now & ~was).sum((1, 2))).tolist()
    assert found.held.tolist() == [(2 * was.sum((1, 2))).tolist(), (2 * now.sum((1, 2))).tolist()]
    assert bool(found.changes) == (before != after)


def test_more_ranks_are_new_and_fewer_are_gone() -> None:
    small, large = plan(2, t=row_wise(strided=False)), plan(4, t=row_wise(strided=False))
    grown, shrunk = diff.compare(small, large), diff.compare(large, small)
    quarter = ROWS // 4 * COLUMNS * 4
    assert grown.arriving.tolist() == [0, quarter, quarter, quarter]
    assert shrunk.arriving.tolist() == [quarter, 2 * quarter, 0, 0]
    assert "Ranks 2-3 are new" in printed(grown)
    assert "Ranks 2-3 are gone" in printed(shrunk)


def test_changes_are_named() -> None:
    old = plan(
        2, moved=table_wise(0), packed=row_wise(), kind=row_wise(), cut=row_wise(strided=False), same=row_wise(), gone=row_wise()
    )
    new = plan(
        2,
        moved=table_wise(1),
        packed=row_wise(packing="bag"),
        kind=column_wise(),
        cut=row_wise(bounds=[3]),
        same=row_wise(),
        added=replicated(),
    )
    said = {change.name: change.what for change in diff.compare(old, new).changes}
    assert said == {
        "moved": "table_wise, on other ranks",
        "packed": "packing unique -> bag",
        "kind": "row_wise -> column_wise",
        "cut": "row_wise, blocks, cut elsewhere",
        "gone": "only in the old plan",
        "added": "only in the new plan",
    }
    assert "1 change their kind, 1 their packing" in printed(diff.compare(old, new))


def test_rows_that_a_table_gains_come_from_nowhere() -> None:
    small, large = (Plan((TablePlan("t", table_wise(0).layout(rows, 4, Cluster(1, 1))),), 1) for rows in (10, 25))
    (change,) = diff.compare(small, large).changes
    assert change.what == "was 10 x 4, is 25 x 4; table_wise, cut elsewhere"
    assert (change.arriving, change.added) == (0, 15 * 4 * 4)


def test_equal_plans_say_that_nothing_moves() -> None:
    one = plan(4, t=row_wise())
    assert "nothing moves" in printed(diff.compare(one, one))


@pytest.mark.parametrize("ranks", [2, 8, 256])
def test_a_comparison_fits_a_hundred_columns(ranks: int) -> None:
    model = workload(40)
    found = diff.compare(plan_of(model, 8), plan_of(model, ranks, seed=1))
    lines = printed(found).splitlines()
    assert max(map(len, lines)) <= report.WIDTH
    assert len(lines) < 60
    totals = json.loads(json.dumps(diff.as_json(found)))
    assert sum(totals["arriving_bytes"]) == totals["moving_bytes"] == found.moving


def printed(found: diff.Diff) -> str:
    file = io.StringIO()
    diff.show(console_for(file), found)
    return file.getvalue()
