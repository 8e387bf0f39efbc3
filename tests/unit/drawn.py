"""Random cuts, plans and batches for hypothesis: small, but of every shape that a layout can have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from shardembed.optim import SGD, Adagrad, TableOptimizer
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.pooling import POOLINGS
from shardembed.tables.table_config import TableConfig


def edges(size: int) -> st.SearchStrategy[list[range]]:
    """Some way to cut `range(size)` into contiguous pieces, none empty."""
    inner = st.sets(st.integers(1, size - 1), max_size=4) if size > 1 else st.just(set[int]())
    return inner.map(lambda cut: [range(a, b) for a, b in zip([0, *sorted(cut)], [*sorted(cut), size], strict=True)])


@st.composite
def layouts(draw: st.DrawFn, rows: int, columns: int, world_size: int, copies: bool = True) -> Layout:
    """Any layout of a table of this size: strips of columns, each in uneven blocks or in the residues of a stride."""
    if copies and draw(st.integers(0, 3)) == 0:
        return Layout(rows, columns, (Shard(range(rows), range(columns), tuple(range(world_size))),))
    shards: list[Shard] = []
    for strip in draw(edges(columns)):
        stride = draw(st.integers(1, 5))
        blocks = draw(edges(rows)) if stride == 1 else [range(r, rows, stride) for r in range(min(stride, rows))]
        shards += [Shard(block, strip, (draw(st.integers(0, world_size - 1)),)) for block in blocks]
    return Layout(rows, columns, tuple(draw(st.permutations(shards))))


@dataclass(frozen=True)
class Case:
    """A collection and its plan."""

    tables: tuple[TableConfig, ...]
    plan: Plan
    optimizers: tuple[TableOptimizer, ...]


@st.composite
def cases(draw: st.DrawFn, max_tables: int = 4) -> Case:
    """Some tables with some features each, cut somehow over some ranks."""
    world_size = draw(st.integers(1, 4))
    tables, plans, optimizers = [], [], []
    for number in range(draw(st.integers(1, max_tables))):
        rows, columns = draw(st.integers(1, 30)), draw(st.integers(1, 6))
        names = [f"feature {number}.{i}" for i in range(draw(st.integers(1, 3)))]
        pooling = {name: draw(st.sampled_from(list(POOLINGS))) for name in names}
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        tables.append(TableConfig(f"table {number}", rows, columns, names, pooling, dtype))
        layout = draw(layouts(rows, columns, world_size))
        plans.append(TablePlan(f"table {number}", layout, draw(st.sampled_from(["unique", "bag"]))))
        optimizers.append(draw(st.sampled_from([SGD(), Adagrad()])))
    return Case(tuple(tables), Plan(tuple(plans), world_size), tuple(optimizers))
