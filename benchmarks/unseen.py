"""Workloads that the planner's prediction is judged on: published models made small, and shapes that calibration has not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from shardembed import optim
from shardembed.planner import workload as workloads
from shardembed.planner.calibrate import drawn
from shardembed.planner.calibrate.stages import Case, batch_of
from shardembed.planner.workload import Counts, TableLoad, Uniform, Workload, Zipf
from shardembed.tables import table_config
from shardembed.tables.placement import Cluster
from shardembed.tables.table_config import TableConfig

SEED = 2026
START = table_config.Constant(0.01)


@dataclass(frozen=True)
class Trial:
    """A case, and what the planner is told of its workload: of measured traffic, the counts of other batches."""

    case: Case
    told: Workload


def trials(cluster: Cluster, plans: int) -> list[Trial]:
    """`plans` plans drawn for each workload, every third of one kind throughout."""
    numbers = np.random.default_rng(SEED)
    found = []
    for name, make in WORKLOADS.items():
        workload = replace(make(), name=name)
        told = _as_measured(workload, cluster.world_size)
        for number in range(plans):
            plan = drawn.plan_of(workload, cluster, numbers, mixed=bool(number % 3))
            found.append(Trial(Case(f"{name} {number}", workload, plan), told))
    return found


def dlrm() -> Workload:
    """MLPerf's DLRM-DCNv2 with a 400th of its rows and 128 samples a rank of two; Adagrad, as published."""
    return _small(workloads.load("dlrm-dcnv2"), 400, 256, optim.Adagrad(), "sorted")


def synthetic() -> Workload:
    """NVIDIA's synthetic-tiny with a 20th of its rows."""
    return _small(workloads.load("synthetic-tiny"), 20, 512, optim.RowwiseAdagrad(), "sorted")


def ranking() -> Workload:
    """Odd widths, bags of many lengths, tables that features share."""
    shapes = [(150_000, 48, (7.0,)), (40_000, 48, (1.0, 12.0)), (9000, 24, (3.5,)), (500, 24, (1.0,)), (80_000, 48, (20.0,))]
    loads = []
    for i, (rows, width, ids) in enumerate(shapes * 2):
        names = [f"f{i}_{j}" for j in range(len(ids))]
        table = TableConfig(f"t{i}", rows, width, feature_names=names, pooling="mean" if i % 2 else "sum", init=START)
        loads.append(TableLoad(table, ids, Uniform() if i % 3 == 0 else Zipf(0.8), "sorted", optim.Adam()))
    return Workload("", 1200, tuple(loads))


def sequences() -> Workload:
    """One vector an id, sent as bfloat16; which rows are popular is known from data."""
    numbers = np.random.default_rng(SEED)
    loads = []
    for i, (rows, exponent) in enumerate([(120_000, 1.1), (60_000, 0.9), (200_000, 1.0)]):
        popular = 1e9 * numbers.permutation(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)
        table = TableConfig(f"t{i}", rows, 64, pooling=None, init=START)
        loads.append(TableLoad(table, (20.0,), Counts(popular.astype(np.int64)), "hashed", optim.SGD()))
    return Workload("", 400, tuple(loads), torch.bfloat16)


def retrieval() -> Workload:
    """Two tables, large for a cache, wide enough for the fused kernel."""
    loads = [
        TableLoad(TableConfig("item", 400_000, 96, init=START), (40.0,), Zipf(1.15), "sorted", optim.RowwiseAdagrad()),
        TableLoad(TableConfig("user", 600_000, 96, init=START), (1.0,), Uniform(), "sorted", optim.RowwiseAdagrad()),
    ]
    return Workload("", 1600, tuple(loads))


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "DLRM-DCNv2, small": dlrm,
    "synthetic-tiny, small": synthetic,
    "ranking": ranking,
    "sequences": sequences,
    "retrieval": retrieval,
}


def _small(whole: Workload, share: int, batch: int, optimizer: optim.TableOptimizer, order: workloads.Order) -> Workload:
    def shrunk(load: TableLoad) -> TableLoad:
        rows = max(min(load.table.num_embeddings, 100), load.table.num_embeddings // share)
        return replace(load, table=replace(load.table, num_embeddings=rows, init=START), order=order, optimizer=optimizer)

    return replace(whole, global_batch_size=batch, tables=tuple(shrunk(load) for load in whole.tables))


def _as_measured(workload: Workload, ranks: int, batches: int = 40) -> Workload:
    """The workload as a user would tell it: where rows have counts, those of 40 batches that are not run."""
    if not any(isinstance(load.skew, Counts) for load in workload.tables):
        return workload
    numbers = np.random.default_rng(SEED + 1)
    seen = batch_of(workload, batches * workload.global_batch_size // ranks, numbers)
    loads = []
    for load in workload.tables:
        ids = torch.cat([torch.as_tensor(seen[name]).flatten() for name in load.table.feature_names or ()])
        loads.append(replace(load, skew=Counts(np.bincount(ids.numpy(), minlength=load.table.num_embeddings))))
    return replace(workload, tables=tuple(loads))
