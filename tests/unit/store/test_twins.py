"""Which rows belong together where columns are cut: every row once, in all of its strips at once, in few stretches."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shardembed.optim import RowwiseAdagrad
from shardembed.store.slab_spec import SlabSpec, build_slabs
from shardembed.store.twins import Stretch, stretches_of
from shardembed.tables.placement import Cluster, Placement, column_wise, grid, row_wise
from shardembed.tables.plan import resolve
from shardembed.tables.table_config import TableConfig

RANKS = 4
CUTS = (
    row_wise(strided=False),
    column_wise(),
    column_wise(ranks=[1, 3]),
    column_wise(ranks=[2, 2]),
    grid(2, ranks=[0, 1, 2, 3], strided=False),
    grid(2, ranks=[0, 1, 2, 3]),
)


def slabs(cuts: list[Placement], rows: list[int], width: int = 8) -> tuple[SlabSpec, ...]:
    tables = [TableConfig(f"t{i}", count, width) for i, count in enumerate(rows)]
    plan = resolve(tables, {f"t{i}": cut for i, cut in enumerate(cuts)}, Cluster(RANKS, RANKS))
    return build_slabs(tables, plan, [RowwiseAdagrad()] * len(tables))


def places(stretches: list[Stretch]) -> Counter[tuple[tuple[int, int, int], ...]]:
    """(slab, owner, slab row) of every strip of a row, for all rows."""
    return Counter(
        tuple((strip.index, strip.owner, strip.first_key + row) for strip in stretch)
        for stretch in stretches
        for row in range(stretch[0].rows)
    )


@given(st.data())
def test_every_row_of_cut_columns_is_in_one_stretch_with_all_its_strips(data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.sampled_from(CUTS), min_size=1, max_size=6))
    specs = slabs(cuts, [data.draw(st.integers(1, 9)) for _ in cuts])
    expected: Counter[tuple[tuple[int, int, int], ...]] = Counter()
    for table in range(len(cuts)):
        lanes = sorted(
            (lane.strip, spec.index, lane) for spec in specs if spec.split_rows for lane in spec.lanes if lane.table == table
        )
        for number in range(len(lanes[0][2].blocks) if lanes else 0):
            blocks = [(index, lane.blocks[number]) for _, index, lane in lanes]
            for row in range(len(blocks[0][1].shard.rows)):
                expected[tuple((index, block.shard.ranks[0], block.first_key + row) for index, block in blocks)] += 1
    assert places(stretches_of(specs)) == expected


def test_tables_that_lie_side_by_side_are_one_stretch() -> None:
    assert len(stretches_of(slabs([column_wise()] * 5, [3, 1, 4, 1, 5]))) == 1
    by_rows_too = stretches_of(slabs([grid(2, ranks=[0, 1, 2, 3])] * 5, [6, 2, 4, 8, 2]))
    assert [sum(strip.rows for strip in stretch) for stretch in by_rows_too] == [22, 22]  # for each half of the rows, two strips
    # On one rank, a table's strips are stacked one by one, so that the next table's first strip does not follow its own.
    assert len(stretches_of(slabs([column_wise(ranks=[2, 2])] * 3, [3, 3, 3]))) == 3


def test_tables_whose_columns_lie_together_have_none() -> None:
    assert not stretches_of(slabs([row_wise()], [3]))
