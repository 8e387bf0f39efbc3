"""Plans drawn from the whole space, and small workloads that between them vary all that a cost depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from shardembed import optim
from shardembed.optim import TableOptimizer
from shardembed.planner.calibrate.stages import Case
from shardembed.planner.workload import TableLoad, Uniform, Workload, Zipf
from shardembed.tables import table_config
from shardembed.tables.placement import (
    Cluster,
    Packing,
    Placement,
    column_wise,
    grid,
    replicated,
    row_wise,
    table_row_wise,
    table_wise,
)
from shardembed.tables.plan import Plan, TablePlan, packing_of
from shardembed.tables.pooling import POOLINGS, Pooling
from shardembed.tables.table_config import TableConfig

COPIED_ELEMENTS = 1 << 20  # of one copied table
LARGE = 3  # times the elements of other cases
OFTEN: dict[Pooling, int] = {"sum": 4, "mean": 2}  # turns of a pooling; others have one
# All of them; the one that has several ways to be updated and an exchange of its own comes back between the others.
TURNS: tuple[TableOptimizer, ...] = tuple(
    one for kind in optim.KINDS if kind is not optim.RowwiseAdagrad for one in (optim.RowwiseAdagrad(), kind())
)


def plan_of(workload: Workload, cluster: Cluster, numbers: np.random.Generator, mixed: bool) -> Plan:
    """A plan drawn at random: every table cut in a way of its own, or all in the same way where that fits them."""
    kind = str(numbers.choice(KINDS))
    packing: Packing = _pick(numbers, ("unique", "bag"))
    plans = []
    for load in workload.tables:
        table = load.table
        if mixed:
            kind, packing = str(numbers.choice(KINDS)), _pick(numbers, ("unique", "bag"))
        placement = _placement(kind, table, packing, cluster, numbers)
        layout = placement.layout(table.cut_rows, table.embedding_dim, cluster)
        plans.append(TablePlan(table.name, layout, packing_of(placement, table, layout)))
    return Plan(tuple(plans), cluster.world_size)


KINDS = ("table_wise", "blocks", "row_wise", "uneven", "column_wise", "grid", "table_row_wise", "replicated")


def _placement(kind: str, table: TableConfig, packing: Packing, cluster: Cluster, numbers: np.random.Generator) -> Placement:
    ranks = numbers.permutation(cluster.world_size).tolist()
    rows, columns = table.num_embeddings, table.embedding_dim
    if kind == "replicated" and rows * columns <= COPIED_ELEMENTS:
        return replicated()
    if kind == "row_wise" and rows > 1:
        return row_wise(ranks, packing=packing)
    if kind == "blocks":
        return row_wise(ranks, strided=False, packing=packing)
    if kind == "uneven":
        return row_wise(ranks, bounds=sorted(numbers.integers(0, rows, len(ranks) - 1).tolist()), packing=packing)
    if kind == "table_row_wise":
        return table_row_wise(int(numbers.integers(-(-len(ranks) // cluster.ranks_per_node))), packing=packing)
    strips = int(numbers.choice([2, 2, 4]))
    if kind == "column_wise" and columns >= strips:
        return column_wise(numbers.integers(0, len(ranks), strips).tolist(), packing=packing)
    if kind == "grid" and columns >= 2 and rows > 1:
        return grid(2, [*ranks, *numbers.permutation(ranks).tolist()], strided=bool(numbers.integers(2)), packing=packing)
    return table_wise(ranks[0], packing=packing)


def _pick(numbers: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(numbers.integers(len(choices)))]


def cases(cluster: Cluster, count: int, seed: int, elements: int = 8 << 20) -> list[Case]:
    """`count` small workloads, each under a plan of its own; optimizers take turns. elements: of all tables of a case; every
    fifth has three times as many, so that its rows are seldom in a cache.
    """
    numbers = np.random.default_rng(seed)
    found = []
    for number in range(count):
        optimizer = TURNS[number % len(TURNS)]
        workload = _workload(f"case {number}", optimizer, cluster.world_size, numbers, elements, large=number % 5 == 0)
        found.append(Case(workload.name, workload, plan_of(workload, cluster, numbers, mixed=bool(number % 3))))
    return found


def _workload(
    name: str, optimizer: TableOptimizer, ranks: int, numbers: np.random.Generator, elements: int, large: bool
) -> Workload:
    wide = int(2 ** numbers.uniform(2, 8.5))
    if optimizer.rowwise and numbers.random() < 0.35:
        wide = int(numbers.uniform(96, 256))  # for its fused kernel
    count = int(2 ** numbers.uniform(0, 4.6))
    samples = int(2 ** numbers.uniform(4, 11.5))
    ids = 2 ** numbers.uniform(10, 16.5)  # of a rank's batch
    ids = min(ids, 2**23 / wide)
    loads = []
    dtype = _pick(numbers, [torch.float32] * 4 + [torch.bfloat16])
    poolings = [pooling for pooling in POOLINGS for _ in range(OFTEN.get(pooling, 1))]
    pooling, alike = cast(Pooling, _pick(numbers, poolings)), numbers.random() < 0.7
    for number in range(count):
        width = int(_pick(numbers, [wide, wide, max(4, wide // 2 // 4 * 4)]))
        most = LARGE * elements / count / width if large else elements / count / width
        rows = int(min(2 ** numbers.uniform(16 if large else 6, 20), most))
        length = max(1, round(ids / count / samples * 2 ** numbers.uniform(-1, 1)))
        skew = _pick(numbers, [Uniform(), Zipf(0.9), Zipf(1.05), Uniform() if large else Zipf(1.2)])
        how = pooling if alike else cast(Pooling, _pick(numbers, poolings))
        table = TableConfig(f"t{number}", rows, width, dtype=dtype, pooling=how, init=table_config.Constant(0.01))
        loads.append(TableLoad(table, (float(length),), skew, "sorted", optimizer))
    wire = _pick(numbers, [None] * 5 + [torch.bfloat16])
    return Workload(name, samples * ranks, tuple(loads), wire)
