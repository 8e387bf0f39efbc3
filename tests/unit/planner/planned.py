"""Plans with made-up costs, for what only shows them: their numbers hang together as real ones do, and mean nothing."""

from __future__ import annotations

import numpy as np

from shardembed.optim import RowwiseAdagrad
from shardembed.planner.result import Estimate, Planned
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.workload import TableLoad, Workload, Zipf
from shardembed.tables.placement import Cluster, Placement, column_wise, grid, replicated, row_wise, table_wise
from shardembed.tables.plan import Plan, TablePlan
from shardembed.tables.table_config import TableConfig

PHASES = ("route", "ids out", "lookup", "vectors back", "combine", "gradients back", "update", "reduce copies")
CATEGORIES = ("weights", "optimizer state", "waiting gradients", "exchange buffers")
GIB = 1 << 30


def topology(ranks: int, memory: int = 80 * GIB) -> Topology:
    link = Link(2e11, 1e-5)
    ops = {"lookup": Op(1e-5, 1e-9, 1e-12)}
    return Topology("made-up", ranks, 8, memory, 4 * GIB, link, Link(2e10, 3e-5), ops, {"memory": "nowhere"})


def workload(tables: int = 9, batch: int = 65536) -> Workload:
    loads = []
    for index in range(tables):
        table = TableConfig(f"table_{index}", 10 ** (2 + index % 6), 2 ** (4 + index % 4), feature_names=[f"f{index}", f"g{index}"])
        loads.append(TableLoad(table, (1.0, float(2 + index)), Zipf(1.05), optimizer=RowwiseAdagrad()))
    return Workload("made-up-model", batch, tuple(loads))


def plan_of(model: Workload, ranks: int, seed: int = 0) -> Plan:
    """Every kind in turn; `seed` moves them on."""
    cluster = Cluster(ranks, 8)
    some = tuple(range(min(ranks, 8)))
    plans = []
    for index, load in enumerate(model.tables):
        packing = "bag" if index % 2 else "unique"
        kinds: list[Placement] = [
            replicated(),
            table_wise((index + seed) % ranks, packing=packing),
            row_wise(strided=False, packing=packing),
            column_wise(some[: max(1, len(some) // 2)], packing=packing),
            row_wise(some, packing=packing),
            grid(2, some if len(some) % 2 == 0 else (0, 0), strided=False, packing=packing),
        ]
        placement = kinds[(index + seed) % len(kinds)]
        table = load.table
        plans.append(
            TablePlan(
                table.name, placement.layout(table.num_embeddings, table.embedding_dim, cluster), placement.packing or "unique"
            )
        )
    return Plan(tuple(plans), ranks)


def made_up(ranks: int = 8, tables: int = 9, *, seed: int = 0, memory: int = 80 * GIB) -> Planned:
    model = workload(tables)
    plan = plan_of(model, ranks, seed)
    held = np.zeros((tables, ranks))
    for index, table in enumerate(plan.tables):
        for shard in table.layout.shards:
            held[index, list(shard.ranks)] += len(shard.rows) * (4 * len(shard.columns) + 4)
    drawn = np.random.default_rng(seed)
    shares = drawn.uniform(0.5, 1.0, (len(PHASES), ranks)) * 1e-3 / np.arange(1, len(PHASES) + 1)[:, None]
    per_table = drawn.uniform(0.2, 1.0, (tables, len(PHASES)))
    per_table *= shares.sum(1) / per_table.sum(0)
    parts = np.stack([held.sum(0), 0.05 * held.sum(0), np.full(ranks, 2.0e6), np.full(ranks, 3.0e6)])
    estimate = Estimate(PHASES, shares, shares * 1e11, CATEGORIES, parts, per_table, held)
    bound = estimate.step_seconds / 1.0034
    return Planned(plan, model, topology(ranks, memory), estimate, bound, 1.25)
