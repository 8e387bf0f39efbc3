"""The planning problems that benchmark pages are about: workloads, rank counts, and how tight memory is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shardembed.optim import TableOptimizer
from shardembed.planner.result import Array, Estimate
from shardembed.planner.topology import Topology
from shardembed.planner.workload import TableLoad, Workload, Zipf
from shardembed.tables.plan import Plan
from shardembed.tables.table_config import TableConfig

WORKLOADS = ("dlrm-dcnv2", "synthetic-tiny", "synthetic-small", "synthetic-medium")  # those that pages are about
TIGHT = 1.15  # the share of the tables' bytes by rank that a tight limit leaves for them
HELD = ("weights", "optimizer state")  # the categories of an estimate that tables themselves take


@dataclass(frozen=True)
class Instance:
    """A workload on `ranks` ranks. tight: memory that hardly holds the tables; else what the topology says."""

    workload: Workload
    ranks: int
    tight: bool

    @property
    def name(self) -> str:
        return f"{self.workload.name} on {self.ranks}, {self.memory}"

    @property
    def memory(self) -> str:
        return "tight" if self.tight else "loose"


def tight(topology: Topology, workload: Workload, loose: Estimate) -> Topology:
    """The same machines with little memory: 1.15 times the tables' bytes, shared evenly by all ranks, beside what the fullest rank
    of the loose plan holds apart from tables (gradients, buffers), which follows the batch and not the tables.
    """
    others = loose.memory_bytes - sum(loose.memory[loose.categories.index(name)] for name in HELD)
    limit = TIGHT * table_bytes(workload) / topology.ranks + float(others.max())
    return replace(topology, memory=round(limit) + topology.memory - topology.room)


def table_bytes(workload: Workload) -> float:
    """Bytes of all tables, each held once and whole, with its optimizer state."""
    return sum(
        load.table.num_embeddings * _row_bytes(load.table, load.optimizer, load.table.embedding_dim) for load in workload.tables
    )


def counted_memory(plan: Plan, workload: Workload) -> Array:
    """`[ranks]` bytes of weights and optimizer state, counted from the shards and from nothing else."""
    held = np.zeros(plan.world_size)
    for load, table in zip(workload.tables, plan.tables, strict=True):
        for shard in table.layout.shards:
            each = len(shard.rows) * _row_bytes(load.table, load.optimizer, len(shard.columns))
            np.add.at(held, list(shard.ranks), each)
    return held


def _row_bytes(table: TableConfig, optimizer: TableOptimizer, columns: int) -> float:
    compute = max(4, table.dtype.itemsize)  # state is kept in the compute dtype
    state = sum(columns if shape == "element" else 1 for shape in optimizer.state.values())
    return columns * table.dtype.itemsize + compute * state


def many_tables(count: int = 2000, seed: int = 0) -> Workload:
    """A large model's tables: rows from a thousand to a hundred million, 16 to 128 columns, 1 to 50 ids a sample."""
    draw = np.random.default_rng(seed)
    rows = (10 ** draw.uniform(3, 8, count)).astype(int)
    widths = draw.choice([16, 32, 64, 128], count)
    ids = np.maximum(1, draw.geometric(0.15, count) * (draw.random(count) < 0.4))
    tables = [
        TableLoad(TableConfig(f"table_{i}", int(rows[i]), int(widths[i])), (float(min(50, ids[i])),), Zipf(1.05))
        for i in range(count)
    ]
    return Workload(f"{count} tables", 65536, tuple(tables))
