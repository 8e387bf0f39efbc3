"""Shards of one kind stack without overlap, and messages hold what was put in."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import PlanError
from shardembed.optim import SGD, Adagrad, RowwiseAdagrad
from shardembed.store.slab_spec import SlabSpec, build_slabs
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.placement import Cluster, column_wise, grid, replicated, row_wise
from shardembed.tables.plan import Plan, TablePlan, resolve
from shardembed.tables.table_config import TableConfig
from shardembed.wire.layout import ALIGNMENT, Part, message_bytes, pack, unpack
from tests.unit.drawn import Case, cases


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


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64]


@st.composite
def messages(draw: st.DrawFn) -> list[list[Part]]:
    """`messages[rank]` are the parts that a rank sends; kinds of parts agree between ranks, counts do not."""
    world_size = draw(st.integers(1, 4))
    kinds = draw(
        st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from([(), (1,), (3,), (4,), (2, 5)])), min_size=1, max_size=4)
    )
    counts = st.lists(st.integers(0, 4), min_size=world_size, max_size=world_size)
    return [[Part(draw(counts), dtype, shape) for dtype, shape in kinds] for _ in range(world_size)]


def values(part: Part, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, (part.items, *part.item_shape), generator=generator).to(part.dtype)


@given(messages())
def test_what_is_packed_is_unpacked(sent: list[list[Part]]) -> None:
    world = len(sent)
    tensors = [[values(part, 10 * rank + i) for i, part in enumerate(parts)] for rank, parts in enumerate(sent)]
    buffers = [pack(tensors[rank], sent[rank], world) for rank in range(world)]
    sizes = [message_bytes(parts, world) for parts in sent]
    assert [buffer.numel() for buffer in buffers] == [sum(size) for size in sizes]
    assert all(buffer.dtype == torch.uint8 for buffer in buffers)
    assert all(size % ALIGNMENT == 0 for row in sizes for size in row)
    for to in range(world):
        arrived = torch.cat([buffers[source].split(sizes[source])[to] for source in range(world)])
        parts = [
            Part([sent[source][i].counts[to] for source in range(world)], p.dtype, p.item_shape) for i, p in enumerate(sent[0])
        ]
        assert message_bytes(parts, world) == [sizes[source][to] for source in range(world)]
        for i, got in enumerate(unpack(arrived, parts, world)):
            wanted = torch.cat([tensors[source][i].split(list(sent[source][i].counts))[to] for source in range(world)])
            assert got.dtype == wanted.dtype
            assert got.shape == wanted.shape
            assert torch.equal(got, wanted)


@given(messages())
def test_blocks_start_where_every_dtype_can_be_viewed(sent: list[list[Part]]) -> None:
    for parts in sent:
        for rank in range(len(sent)):
            for part in parts:
                size = part.counts[rank] * prod(part.item_shape) * part.dtype.itemsize
                assert size <= part.chunk_bytes(rank) < size + ALIGNMENT
                assert part.chunk_bytes(rank) % ALIGNMENT == 0


@pytest.mark.parametrize("width", [3, 8])
def test_values_are_cast_on_the_way(width: int) -> None:
    tensor = torch.full((2, width), 1e6)
    for dtype, wanted in [(torch.float16, torch.inf), (torch.bfloat16, float(torch.tensor(1e6).bfloat16()))]:
        part = Part([1, 1], dtype, (width,))
        (got,) = unpack(pack([tensor], [part], 2), [part], 2)
        assert got.dtype == dtype
        assert got.float().eq(wanted).all()
