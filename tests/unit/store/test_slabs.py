"""Shards of one kind stack without overlap, and messages hold what was put in."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import ConfigError, PlanError
from shardembed.optim import SGD, Adagrad, NoOptimizer, RowwiseAdagrad
from shardembed.store.slab_spec import SlabSpec, build_slabs
from shardembed.tables.dynamic import Dynamic
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.placement import Cluster, Placement, column_wise, grid, replicated, row_wise, table_wise
from shardembed.tables.plan import Plan, TablePlan, resolve
from shardembed.tables.table_config import TableConfig
from tests.unit.drawn import Case, cases, layouts


@given(cases())
def test_keys_of_a_rank_are_a_bijection(case: Case) -> None:
    specs = build_slabs(case.tables, case.plan, case.optimizers)
    assert [spec.index for spec in specs] == list(range(len(specs)))
    placed: list[tuple[int, Shard]] = []
    for spec in specs:
        for rank in range(case.plan.world_size):
            here = [block for lane in spec.lanes for block in lane.blocks if rank in block.shard.ranks]
            keys = [key for block in here for key in range(block.first_key, block.first_key + len(block.shard.rows))]
            assert sorted(keys) == list(range(spec.rows[rank]))
        for lane in spec.lanes:
            table, layout = case.tables[lane.table], case.plan.tables[lane.table].layout
            assert (spec.width, spec.dtype, spec.optimizer) == (len(lane.columns), table.dtype, case.optimizers[lane.table])
            assert spec.copied == (layout.copied and case.plan.world_size > 1)
            assert lane.columns == layout.strips[lane.strip].columns
            assert lane.stride == layout.strips[lane.strip].stride
            assert all(a.shard.rows.start < b.shard.rows.start for a, b in pairwise(lane.blocks))
            placed += [(lane.table, block.shard) for block in lane.blocks]
    planned = [(i, shard) for i, table in enumerate(case.plan.tables) for shard in table.layout.shards]
    assert sorted(placed, key=repr) == sorted(planned, key=repr)  # every shard lies in one slab, once


@given(cases())
def test_as_few_slabs_as_kinds(case: Case) -> None:
    specs = build_slabs(case.tables, case.plan, case.optimizers)
    kinds = {(spec.width, spec.dtype, spec.optimizer, spec.policy, spec.copied, spec.split_rows) for spec in specs}
    assert len(kinds) == len(specs)


def specs_of(tables: list[TableConfig], plan: object, optimizers: list[object], world_size: int = 2) -> tuple[SlabSpec, ...]:
    resolved = resolve(tables, plan, Cluster(world_size, world_size))  # type: ignore[arg-type]
    return build_slabs(tables, resolved, optimizers)  # type: ignore[arg-type]


def test_what_shares_a_slab() -> None:
    a, b = TableConfig("a", 8, 4), TableConfig("b", 6, 4)
    (one,) = specs_of([a, b], row_wise(), [SGD(), SGD()])
    assert one.rows == (7, 7)
    assert len(specs_of([a, b], row_wise(), [SGD(), SGD(lr=1.0)])) == 2
    assert len(specs_of([a, TableConfig("b", 6, 4, dtype=torch.float64)], row_wise(), [SGD(), SGD()])) == 2
    assert len(specs_of([a, TableConfig("b", 6, 5)], row_wise(), [SGD(), SGD()])) == 2
    assert len(specs_of([a, b], {"a": row_wise(), "b": replicated()}, [SGD(), SGD()])) == 2
    assert len(specs_of([a, b], {"a": row_wise(), "b": replicated()}, [SGD(), SGD()], world_size=1)) == 1


def test_a_rowwise_optimizer_knows_that_its_rows_are_split() -> None:
    table = TableConfig("a", 8, 4)
    assert [spec.split_rows for spec in specs_of([table], column_wise(), [RowwiseAdagrad()])] == [True]
    assert [spec.split_rows for spec in specs_of([table], column_wise(), [Adagrad()])] == [False]
    assert [spec.split_rows for spec in specs_of([table], row_wise(), [RowwiseAdagrad()])] == [False]
    assert [spec.split_rows for spec in specs_of([table], grid(2, [0, 1]), [RowwiseAdagrad()])] == [True]


def test_strips_cut_differently_are_no_place_for_a_rowwise_optimizer() -> None:
    shards = (Shard(range(4), range(1), (0,)), Shard(range(2), range(1, 2), (0,)), Shard(range(2, 4), range(1, 2), (1,)))
    plan = Plan((TablePlan("a", Layout(4, 2, shards)),), 2)
    with pytest.raises(PlanError, match="table 'a': a rowwise optimizer or max_norm on cut columns needs the same row cuts"):
        build_slabs([TableConfig("a", 4, 2)], plan, [RowwiseAdagrad()])
    assert len(build_slabs([TableConfig("a", 4, 2)], plan, [Adagrad()])) == 1


def test_each_strip_of_a_dynamic_table_has_a_slab_of_its_own() -> None:
    """Whose keys are ids, and whose rows are buckets; fixed tables share theirs as before."""
    fixed, other = TableConfig("fixed", 8, 2), TableConfig("other", 6, 2)
    a, b = (TableConfig(name, 1000, 4, dynamic=Dynamic()) for name in "ab")
    plan = {"fixed": row_wise(), "a": column_wise(), "other": row_wise(), "b": row_wise()}
    specs = specs_of([fixed, a, other, b], plan, [SGD()] * 4)
    found = [(spec.dynamic, spec.is_dynamic, [(lane.table, lane.strip) for lane in spec.lanes], spec.rows) for spec in specs]
    assert found == [
        (None, False, [(0, 0), (2, 0)], (7, 7)),
        (Dynamic(), True, [(1, 0)], (7, 0)),
        (Dynamic(), True, [(1, 1)], (0, 7)),
        (Dynamic(), True, [(3, 0)], (4, 3)),
    ]
    assert [spec.key_dtype for spec in specs] == [torch.int32, torch.int64, torch.int64, torch.int64]
    assert [spec.index for spec in specs] == [0, 1, 2, 3]
    assert [block.first_key for block in specs[3].lanes[0].blocks] == [0, 0]


@given(st.data())
def test_buckets_of_a_rank_are_a_bijection(data: st.DataObject) -> None:
    """Whatever the cut of a dynamic table, each strip's slab numbers a rank's buckets through."""
    table = TableConfig("item", data.draw(st.integers(1, 4000)), data.draw(st.integers(1, 5)), dynamic=Dynamic())
    layout = data.draw(layouts(table.cut_rows, table.embedding_dim, 3, copies=False))
    specs = build_slabs([table], Plan((TablePlan("item", layout),), 3), [SGD()])
    assert len(specs) == len(layout.strips)
    for spec, strip in zip(specs, layout.strips, strict=True):
        (lane,) = spec.lanes
        assert lane.columns == strip.columns
        assert sum(spec.rows) == table.cut_rows
        for rank in range(3):
            here = [block for block in lane.blocks if rank in block.shard.ranks]
            keys = [key for block in here for key in range(block.first_key, block.first_key + len(block.shard.rows))]
            assert sorted(keys) == list(range(spec.rows[rank]))


def test_what_a_dynamic_table_cannot_be_is_told_by_name() -> None:
    table = TableConfig("item", 1000, 4, dynamic=Dynamic())
    with pytest.raises(
        PlanError, match=r"table 'item' is dynamic, and copies would each see other ids come and go; use table_wise"
    ):
        specs_of([table], replicated(), [SGD()])
    assert len(specs_of([table], replicated(), [SGD()], world_size=1)) == 1  # there is but one
    with pytest.raises(ConfigError, match=r"table 'item' is dynamic: its rows come and go, so they cannot be Parameters"):
        specs_of([table], row_wise(), [NoOptimizer()])
    normed = TableConfig("item", 1000, 4, dynamic=Dynamic(), max_norm=1.0)
    for cut in (column_wise(), grid(2, [0, 1])):
        with pytest.raises(PlanError, match=r"table 'item' is dynamic and has max_norm, for which its columns must lie together"):
            specs_of([normed], cut, [SGD()])
    whole: list[Placement] = [row_wise(), table_wise(1)]
    assert [len(specs_of([normed], placement, [SGD()])) for placement in whole] == [1, 1]
