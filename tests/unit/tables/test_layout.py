"""Layouts tile their table, each element once, or are refused; every kind of placement builds such a layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from shardembed.errors import PlanError
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.placement import (
    Cluster,
    Placement,
    column_wise,
    grid,
    replicated,
    row_wise,
    table_row_wise,
    table_wise,
)
from tests.unit.drawn import layouts

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 8))


def times_held(layout: Layout) -> np.ndarray:
    held = np.zeros((layout.num_embeddings, layout.embedding_dim), dtype=int)
    for shard in layout.shards:
        held[np.ix_(shard.rows, shard.columns)] += 1
    return held


@given(SIZES.flatmap(lambda size: layouts(*size, world_size=4)))
def test_a_layout_tiles(layout: Layout) -> None:
    assert (times_held(layout) == 1).all()
    assert [strip.columns.start for strip in layout.strips] == sorted({shard.columns.start for shard in layout.shards})
    assert layout.ranks == {rank for shard in layout.shards for rank in shard.ranks}
    again = [Shard.from_json(shard.to_json()) for shard in layout.shards]
    assert again == list(layout.shards)


@given(SIZES.flatmap(lambda size: layouts(*size, world_size=4)), st.data())
def test_a_layout_that_does_not_tile_is_refused(layout: Layout, data: st.DataObject) -> None:
    shards = list(layout.shards)
    at = data.draw(st.integers(0, len(shards) - 1))
    shard = shards[at]
    rows, columns = shard.rows, shard.columns
    mutations = {
        "lost": shards[:at] + shards[at + 1 :],
        "twice": [*shards, shard],
        "shifted rows": [replace(shard, rows=range(rows.start + 1, rows.stop + 1, rows.step))],
        "longer": [replace(shard, rows=range(rows.start, rows.stop + rows.step, rows.step))],
        "shorter": [replace(shard, rows=rows[:-1])],
        "empty": [replace(shard, rows=range(rows.start, rows.start, rows.step))],
        "shifted columns": [replace(shard, columns=range(columns.start + 1, columns.stop + 1))],
        "wider": [replace(shard, columns=range(columns.start, columns.stop + 1))],
        "narrower": [replace(shard, columns=columns[:-1])],
        "no rank": [replace(shard, ranks=())],
        "rank twice": [replace(shard, ranks=(0, 0))],
        "negative rank": [replace(shard, ranks=(-1,))],
    }
    name = data.draw(st.sampled_from(sorted(mutations)))
    changed = mutations[name]
    if name not in ("lost", "twice"):
        changed = shards[:at] + changed + shards[at + 1 :]
    # An equal range written otherwise is the same layout.
    assume(name in ("no rank", "rank twice", "negative rank") or changed != shards)
    with pytest.raises(PlanError):
        Layout(layout.num_embeddings, layout.embedding_dim, tuple(changed))


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ([(range(5), range(4))], "rows up to 5, the table has 6"),
        ([(range(6), range(3))], "columns up to 3, the table has 4"),
        ([(range(6), range(0, 4, 2)), (range(6), range(1, 4, 2))], "columns from"),
        ([(range(0, 6, 2), range(4))], "one shard for each of its 2 residues"),
        ([(range(0, 6, 2), range(4)), (range(1, 6), range(4))], "residues"),
        ([(range(3), range(4)), (range(4, 6), range(4))], "rows from 3 on are held by no shard"),
        ([(range(4), range(4)), (range(3, 6), range(4))], "or twice"),
        ([], "columns up to 0"),
    ],
)
def test_the_gap_is_named(shards: list[tuple[range, range]], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Layout(6, 4, tuple(Shard(rows, columns, (0,)) for rows, columns in shards))


@given(SIZES, st.integers(1, 6), st.integers(1, 3), st.none() | st.booleans(), st.data())
def test_every_kind_tiles(size: tuple[int, int], world: int, per_node: int, strided: bool | None, data: st.DataObject) -> None:
    rows, columns = size
    cluster = Cluster(world, per_node)
    rank, node = st.integers(0, world - 1), st.integers(0, (world - 1) // per_node)
    some_ranks = st.lists(rank, min_size=1, max_size=world)
    strips = data.draw(st.integers(1, columns))
    dealt = data.draw(st.none() | st.lists(rank, min_size=strips, max_size=strips))
    ranks = data.draw(some_ranks)
    bounds = sorted(data.draw(st.lists(st.integers(0, rows), min_size=len(ranks) - 1, max_size=len(ranks) - 1)))
    placements = {
        table_wise(ranks[0]): {ranks[0]},
        row_wise(strided=strided): set(range(min(world, rows))),
        row_wise(ranks, strided=strided): set(ranks[:rows]),
        row_wise(ranks, bounds=bounds): set(ranks),
        column_wise(): set(range(min(world, columns))),
        column_wise(ranks[:columns]): set(ranks[:columns]),
        table_row_wise(data.draw(node), strided=strided): set(range(world)),
        grid(strips, dealt, strided=strided): set(dealt or range(world)),
        replicated(): set(range(world)),
    }
    for placement, allowed in placements.items():
        layout = placement.layout(rows, columns, cluster)
        assert (times_held(layout) == 1).all(), placement
        assert layout.ranks <= allowed, placement
        assert all(len(shard.rows) for shard in layout.shards), placement
    assert row_wise().layout(rows, columns, cluster).ranks == set(range(min(world, rows)))
    assert replicated().layout(rows, columns, cluster).copied == (world > 1)


def test_even_cuts_differ_by_one_row_at_most() -> None:
    layout = row_wise().layout(11, 2, Cluster(4, 4))
    assert [len(shard.rows) for shard in layout.shards] == [3, 3, 3, 2]
    strips = column_wise().layout(1, 11, Cluster(4, 4)).strips
    assert [len(strip.columns) for strip in strips] == [3, 3, 3, 2]


def test_rows_are_dealt_out_unless_blocks_are_asked_for() -> None:
    cluster = Cluster(3, 3)
    for placement in (row_wise(), table_row_wise(0), grid(1), row_wise(strided=True)):
        assert [shard.rows for shard in placement.layout(8, 2, cluster).shards] == [range(0, 8, 3), range(1, 8, 3), range(2, 8, 3)]
    for placement in (row_wise(strided=False), table_row_wise(0, strided=False), grid(1, strided=False), row_wise(bounds=[3, 6])):
        assert [shard.rows for shard in placement.layout(8, 2, cluster).shards] == [range(0, 3), range(3, 6), range(6, 8)]


def test_grid_takes_a_node_a_strip() -> None:
    layout = grid(3).layout(8, 6, Cluster(4, 2))
    assert [tuple(block.ranks[0] for block in strip.blocks) for strip in layout.strips] == [(0, 1), (2, 3), (0, 1)]
    assert table_row_wise(1).layout(8, 6, Cluster(3, 2)).ranks == {2}


@pytest.mark.parametrize(
    ("placement", "says"),
    [
        (row_wise(bounds=[3]), "must be 2 ascending numbers up to 10, for 3 ranks"),
        (row_wise(bounds=[5, 3]), "ascending"),
        (row_wise(bounds=[5, 11]), "up to 10"),
        (row_wise(bounds=[-1, 5]), "ascending"),
        (column_wise([0, 1, 2, 0, 1]), "4 columns cannot be cut over 5 ranks; name at most 4"),
        (grid(5), "4 columns cannot be cut into 5 strips"),
        (grid(0), "0 strips"),
        (grid(2, [0, 1, 2]), "3 ranks cannot be dealt out to 2 strips in equal parts"),
        (table_row_wise(2), r"no node 2: 3 ranks at 2 a node are 2 node\(s\)"),
        (table_row_wise(-1), "no node -1"),
        (table_wise(-1), "not negative"),
        (grid(-1), "strips"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(placement: Placement, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        placement.layout(10, 4, Cluster(3, 2))


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(PlanError, match="packing must be 'unique' or 'bag', not 'sorted'"):
        row_wise(packing="sorted")  # type: ignore[arg-type]
    for kind in (row_wise, column_wise, lambda ranks: grid(2, ranks)):
        with pytest.raises(PlanError, match="at least one rank"):
            kind([])
    with pytest.raises(PlanError, match="cannot be combined with strided"):
        row_wise(bounds=[1], strided=True)
