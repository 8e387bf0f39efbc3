"""Which shards lie together: from a plan to slabs, the same on every rank.

A slab is one `[rows, width]` matrix a rank, made of all shards there that agree on width, dtype, optimizer, row policy, copying
and row statistics. A lane is one column strip of one table inside a slab. A key is a row number inside the owner's slab. A strip of
a dynamic table has a slab of its own, since ids are its keys; what its blocks are made of are buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardembed.errors import ConfigError, PlanError
from shardembed.optim import TableOptimizer
from shardembed.tables.dynamic import Dynamic
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.plan import Plan
from shardembed.tables.table_config import RowPolicy, TableConfig


@dataclass(frozen=True)
class Block:
    """A shard's place in its slab.

    Attributes:
        shard: what lies there.
        first_key: the slab row at which it begins, on each of its owners; of a dynamic table, the bucket.
    """

    shard: Shard
    first_key: int


@dataclass(frozen=True)
class Lane:
    """A strip of a table inside a slab.

    Attributes:
        table: its number in the collection.
        strip: its number among the table's.
        columns: of the table.
        stride: of the rows of its blocks; 1 where these are contiguous.
        blocks: what it is cut into, in row order.
    """

    table: int
    strip: int
    columns: range
    stride: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class SlabSpec:
    """What all ranks know of one slab.

    Attributes:
        index: its number in the collection.
        width: columns of every row.
        dtype: of the rows.
        optimizer: of all its tables.
        policy: of all its tables.
        copied: every rank holds all of it.
        split_rows: a row's columns lie in several lanes, and the optimizer or max_norm needs a statistic of the whole row.
        lanes: in the order of tables and strips.
        rows: how many rows each rank holds; buckets of a dynamic table.
        dynamic: how ids come and go; None where keys are row numbers.
    """

    index: int
    width: int
    dtype: torch.dtype
    optimizer: TableOptimizer
    policy: RowPolicy
    copied: bool
    split_rows: bool
    lanes: tuple[Lane, ...]
    rows: tuple[int, ...]
    dynamic: Dynamic | None = None

    @property
    def is_dynamic(self) -> bool:
        """Its keys are ids of its one table, any int64."""
        return self.dynamic is not None

    @property
    def counts_ids(self) -> bool:
        """Owners have to know how often ids occur in a batch."""
        return self.policy.scale_grad_by_freq or (self.dynamic is not None and self.dynamic.counts_ids)

    @property
    def compute_dtype(self) -> torch.dtype:
        """What sums, updates and optimizer state are computed in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def key_dtype(self) -> torch.dtype:
        """Keys travel in 32 bits where every rank's rows fit, and ids in 64."""
        fit = not self.is_dynamic and max(self.rows) <= torch.iinfo(torch.int32).max
        return torch.int32 if fit else torch.int64


def build_slabs(tables: Sequence[TableConfig], plan: Plan, optimizers: Sequence[TableOptimizer]) -> tuple[SlabSpec, ...]:
    """Stack the shards of `plan` into slabs, in the order of tables and strips. One optimizer a table.

    Raises:
        PlanError: a rowwise optimizer or max_norm on strips whose rows are cut differently, a row policy on copies that would
            need the other copies' ids, or a dynamic table that is copied, or has max_norm and cut columns.
        ConfigError: a dynamic table whose rows would be Parameters.
    """
    stacks: dict[tuple[object, ...], _Stack] = {}
    for index, (table, table_plan, optimizer) in enumerate(zip(tables, plan.tables, optimizers, strict=True)):
        layout, policy = table_plan.layout, table.policy
        split_rows = (optimizer.rowwise or policy.max_norm is not None) and len(layout.strips) > 1
        if split_rows:
            _check_twins(table.name, layout)
        if table.dynamic is not None:
            _check_dynamic(table, layout, optimizer, plan.world_size)
        for number, strip in enumerate(layout.strips):
            # A single rank has nothing to copy to, so its "copies" are plain shards.
            copied = layout.copied and plan.world_size > 1
            if copied:
                _check_copies(table.name, policy)
            kind = (len(strip.columns), table.dtype, optimizer, policy, copied, split_rows)
            own = None if table.dynamic is None else (index, number)
            stack = stacks.setdefault((kind, own), _Stack(kind, table.dynamic, [], [0] * plan.world_size))
            blocks = tuple(stack.place(shard) for shard in strip.blocks)
            stack.lanes.append(Lane(index, number, strip.columns, strip.stride, blocks))
    return tuple(
        SlabSpec(index, *stack.kind, tuple(stack.lanes), tuple(stack.rows), stack.dynamic)
        for index, stack in enumerate(stacks.values())
    )


@dataclass
class _Stack:
    kind: tuple[int, torch.dtype, TableOptimizer, RowPolicy, bool, bool]  # the fields of a spec from `width` to `split_rows`
    dynamic: Dynamic | None
    lanes: list[Lane]
    rows: list[int]

    def place(self, shard: Shard) -> Block:
        # Copies have one key on all ranks: they share a slab with copies only, so every rank has stacked the same rows so far.
        block = Block(shard, self.rows[shard.ranks[0]])
        for rank in shard.ranks:
            self.rows[rank] += len(shard.rows)
        return block


def _check_twins(name: str, layout: Layout) -> None:
    cuts = {tuple(block.rows for block in strip.blocks) for strip in layout.strips}
    if len(cuts) > 1:
        raise PlanError(
            f"table {name!r}: a rowwise optimizer or max_norm on cut columns needs the same row cuts in every strip; use grid() "
            "or column_wise(), or an optimizer with one state number an element (Adagrad)"
        )


def _check_copies(name: str, policy: RowPolicy) -> None:
    # Copies are looked up where they are asked for; nobody learns in time what the other ranks look up.
    wrong = [
        what
        for what, given in (("max_norm", policy.max_norm is not None), ("scale_grad_by_freq", policy.scale_grad_by_freq))
        if given
    ]
    if wrong:
        raise PlanError(
            f"table {name!r}: {' and '.join(wrong)} on a replicated table would need every rank's ids before each lookup; use "
            "table_wise() or row_wise() for it (plan='auto' does)"
        )


def _check_dynamic(table: TableConfig, layout: Layout, optimizer: TableOptimizer, world_size: int) -> None:
    name = f"table {table.name!r} is dynamic"
    if not optimizer.stepped:
        raise ConfigError(
            f"{name}: its rows come and go, so they cannot be Parameters of your own optimizer (optimizer=None); give it one of "
            "se.optim, optimizer=se.optim.RowwiseAdagrad() say"
        )
    if layout.copied and world_size > 1:
        raise PlanError(
            f"{name}, and copies would each see other ids come and go; use table_wise() or row_wise() in place of replicated()"
        )
    if table.max_norm is not None and len(layout.strips) > 1:
        raise PlanError(f"{name} and has max_norm, for which its columns must lie together; use table_wise() or row_wise()")
