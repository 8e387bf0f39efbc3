"""Bytes that a step must send, by formula: ours in each packing, TorchRec's, and those of a true reduce-scatter.

Expected values from the planner's model of traffic, for the workload's skew. Bytes that stay on their rank are not counted.

Legend: R ranks, B samples a rank, D columns, L ids a bag.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from shardembed.planner import cost_demand as demands
from shardembed.planner.traffic import Traffic
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.plan import Plan, TablePlan
from shardembed.wire.header import HEADER_BYTES, SLAB_COUNTS_BYTES

INT64 = 8


@dataclass(frozen=True)
class Sent:
    """Bytes that all ranks together send to others in a step."""

    counts: float
    ids: float
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.counts + self.ids + self.forward + self.backward


def table_bytes(load: TableLoad, plan: TablePlan, samples: int, ranks: int, wire: int | None = None) -> tuple[float, float]:
    """(keys and lengths, vectors one way) that the batches of all ranks send for one table, in bytes."""
    if plan.layout.copied:
        return 0.0, 0.0
    traffic = Traffic.of(load, samples, ranks)
    table = demands.Table(load, traffic, samples, ranks, wire or load.table.dtype.itemsize)
    keys, vectors = 0.0, 0.0
    for strip in plan.layout.strips:
        held = demands.Holdings.of(strip, traffic.blocks([shard.rows for shard in strip.blocks]))
        demand = table.demand(held.asked, plan.packing)
        keys += float(table.key_bytes(demand, held.rows).sum())
        vectors += float(table.vector_bytes(demand, np.full(len(held.rows), float(len(strip.columns)))).sum())
    # Each owner is asked by all ranks alike, itself among them.
    return keys * (ranks - 1), vectors * (ranks - 1)


def our_bytes(workload: Workload, plan: Plan, samples: int, slabs: int = 1) -> Sent:
    """What our step sends under a plan."""
    ranks = plan.world_size
    wire = workload.wire_dtype.itemsize if workload.wire_dtype else None
    sent = [table_bytes(load, table, samples, ranks, wire) for load, table in zip(workload.tables, plan.tables, strict=True)]
    vectors = sum(vectors for _, vectors in sent)
    counts = (HEADER_BYTES + SLAB_COUNTS_BYTES * slabs) * ranks * (ranks - 1)
    return Sent(counts, sum(keys for keys, _ in sent), vectors, vectors)


def reduce_scatter_bytes(workload: Workload, samples: int, ranks: int) -> Sent:
    """Row-wise with every id sent as int64 to its owner, a partial sum of every bag from every rank (a true reduce-scatter), and an
    all-gather of the gradients. The least that this way needs, with lengths as int64 to every rank.
    """
    ids = sum(sum(load.ids_per_sample) for load in workload.tables) * samples
    features = sum(len(load.ids_per_sample) for load in workload.tables)
    columns = sum(len(load.ids_per_sample) * load.table.embedding_dim for load in workload.tables)
    lengths = INT64 * features * samples * ranks * (ranks - 1)
    vectors = 4.0 * samples * columns * ranks * (ranks - 1)
    return Sent(lengths, INT64 * ids * (ranks - 1), vectors, vectors)


def torchrec_bytes(workload: Workload, samples: int, ranks: int) -> Sent:
    """As `reduce_scatter_bytes` with Gloo's reduce-scatter, which is an all-reduce of all ranks' bags and sends twice as much."""
    least = reduce_scatter_bytes(workload, samples, ranks)
    return replace(least, forward=2 * least.forward)
