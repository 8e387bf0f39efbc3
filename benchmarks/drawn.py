"""Forty planning problems drawn from a seed: models, rank counts and memory as nobody chose them.

Everything of an instance follows from its number, so one can be run alone (`python -m benchmarks.plans --only-drawn 17`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from benchmarks.instances import TIGHT, table_bytes
from shardembed import optim
from shardembed.optim import TableOptimizer
from shardembed.planner.cost_model import CostModel
from shardembed.planner.cost_phases import STATE, WEIGHTS
from shardembed.planner.topology import Topology
from shardembed.planner.traffic import Asked
from shardembed.planner.workload import Order, Skew, TableLoad, Uniform, Workload, Zipf
from shardembed.tables.pooling import Pooling
from shardembed.tables.table_config import TableConfig

SEED, DRAWN = 19, 40
TABLES = (5, 2000)
RANKS = (1, 10)  # powers of two
FULL = 0.5  # of the memory of all ranks, that tables may fill: larger models are drawn smaller
BESIDE = 1.25  # times the mean, what the fullest rank of a tight instance holds beside its tables
POOLINGS: tuple[Pooling, ...] = ("sum", "sum", "mean", "max", None)
OPTIMIZERS: tuple[TableOptimizer, ...] = (optim.RowwiseAdagrad(), optim.Adagrad(), optim.Adam(), optim.SGD(lr=0.1))


@dataclass(frozen=True)
class Drawn:
    """One of them.

    Attributes:
        number: from which all follows.
        workload: the model.
        topology: the machines, with as much memory as the instance leaves them.
        tight: memory that hardly holds the tables.
    """

    number: int
    workload: Workload
    topology: Topology
    tight: bool


def drawn(number: int, machines: Topology) -> Drawn:
    """The instance with this number on so many of these machines as it asks for."""
    draw = np.random.default_rng([SEED, number])
    tables = round(float(np.exp(draw.uniform(*np.log(TABLES)))))
    topology = machines.scaled(2 ** int(draw.integers(RANKS[0], RANKS[1] + 1)))
    tight = bool(draw.random() < 0.5)
    workload = _workload(f"drawn {number}, {tables} tables", tables, draw)
    share = FULL * topology.room * topology.ranks / table_bytes(workload)
    if share < 1:
        workload = replace(workload, tables=tuple(_smaller(load, share) for load in workload.tables))
    return Drawn(number, workload, _tight(topology, workload) if tight else topology, tight)


def _workload(name: str, tables: int, draw: np.random.Generator) -> Workload:
    """A model's optimizer, batch, widths and poolings are drawn once, its tables from these."""
    optimizer = OPTIMIZERS[int(draw.integers(len(OPTIMIZERS)))]
    batch = 2 ** int(draw.integers(13, 18))
    widths = draw.choice([8, 16, 32, 64, 96, 128, 256], int(draw.integers(1, 5)), replace=False)
    poolings = draw.choice(len(POOLINGS), int(draw.integers(1, 4)))
    longest, pooled = float(draw.integers(2, 100)), float(draw.random())
    loads = []
    for index in range(tables):
        rows, width = int(10 ** draw.uniform(2, 8)), int(draw.choice(widths))
        pooling = POOLINGS[int(draw.choice(poolings))]
        features = 1 + int(draw.random() < 0.1)
        ids = tuple(_ids(draw, longest, pooled) for _ in range(features))
        names = tuple(f"f{index}_{feature}" for feature in range(features))
        order: Order = ("hashed", "hashed", "sorted", "unknown")[int(draw.integers(4))]
        skew: Skew = Uniform() if draw.random() < 0.2 else Zipf(round(float(draw.uniform(0.5, 1.3)), 3))
        loads.append(TableLoad(TableConfig(f"t{index}", rows, width, names, pooling), ids, skew, order, optimizer))
    return Workload(name, batch, tuple(loads))


def _ids(draw: np.random.Generator, longest: float, pooled: float) -> float:
    return round(float(np.exp(draw.uniform(0, np.log(longest)))), 1) if draw.random() < pooled else 1.0


def _smaller(load: TableLoad, share: float) -> TableLoad:
    return replace(load, table=replace(load.table, num_embeddings=max(1, int(share * load.table.num_embeddings))))


def _tight(topology: Topology, workload: Workload) -> Topology:
    """As `instances.tight`, without a plan to look at: beside tables, ranks hold what all tables do that are dealt out by rows."""
    model = CostModel(workload, topology)
    beside = 0.0
    for number, table in enumerate(model.tables):
        whole = Asked(*(np.array([n]) for n in (table.traffic.ids, table.traffic.distinct, table.traffic.touched)))
        width, rows = np.array([float(table.width)]), np.array([float(table.rows)])
        held = model.parts_in_detail(number, width, whole, rows, "unique")[1][0]
        beside += (held.sum() - held[WEIGHTS] - held[STATE]) / topology.ranks + model.common(number, [table.width], 1, "unique")[1]
    limit = TIGHT * table_bytes(workload) / topology.ranks + BESIDE * beside
    memory = round(limit) + topology.memory - topology.room
    return replace(topology, memory=min(topology.memory, memory))
