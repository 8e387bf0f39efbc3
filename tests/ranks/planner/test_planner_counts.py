"""What the planner counts of a step against a real one: entries, segments, distinct rows and bytes of every owner, and calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from typing import Any

import numpy as np
import pytest
import torch

import shardembed as se
from shardembed.inputs.ids import IdBatch
from shardembed.kernels.grouping import compiled
from shardembed.kernels.reference import ReferenceKernel
from shardembed.planner.calibrate.stages import batch_of
from shardembed.planner.cost import CostModel, estimate
from shardembed.planner.cost_demand import Holdings
from shardembed.planner.cost_ops import OPS
from shardembed.planner.cost_phases import BACK, GRADS, IDS
from shardembed.planner.cuts import dealt
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.workload import TableLoad, Uniform, Workload, Zipf
from shardembed.store.slab import Slab
from shardembed.tables.layout import Layout
from shardembed.tables.placement import Cluster, Packing
from shardembed.tables.plan import Plan, TablePlan, resolve
from shardembed.tables.table_config import features_of
from tests.harness import run_ranks

SAMPLES = 600  # of a rank
SIGMAS = 5.0

Shape = str  # of the layouts: "dealt", "shares" or "blocks"


def workload(ranks: int) -> Workload:
    """Widths differ, so that each table has a slab of its own."""
    shapes: list[tuple[Any, tuple[float, ...], Any]] = [
        (se.TableConfig("pair", 900, 4, feature_names=["a", "b"]), (3.0, 1.0), Uniform()),
        (se.TableConfig("hot", 1500, 8, pooling="mean"), (6.0,), Zipf(1.2)),
        (se.TableConfig("list", 700, 12, pooling=None), (2.0,), Zipf(1.05)),
    ]
    loads = [TableLoad(table, ids, skew, "sorted", se.optim.Adagrad()) for table, ids, skew in shapes]
    return Workload("counted", SAMPLES * ranks, tuple(loads))


def plan_of(given: Workload, ranks: int, shape: Shape, packing: Packing) -> Plan:
    def layout(load: TableLoad) -> Layout:
        rows, columns = load.table.num_embeddings, load.table.embedding_dim
        if shape != "shares":
            return se.row_wise(strided=shape == "dealt").layout(rows, columns, Cluster(ranks, ranks))
        # Shares of rows that are asked for alike would be contiguous.
        shards = dealt(replace(load, skew=Zipf(1.05)), range(ranks), [2 + rank % 3 for rank in range(ranks)])
        assert len(shards) >= 2 * ranks, "a rank is to own several residues"
        return Layout(rows, columns, tuple(shards))

    return Plan(tuple(TablePlan(load.table.name, layout(load), packing) for load in given.tables), ranks)


def counted_in_rank(rank: int, world_size: int, shape: Shape, packing: Packing) -> dict[str, Any]:
    """One step: what this rank is asked for, slab by slab, and what it sends."""
    given = workload(world_size)
    tables = tuple(load.table for load in given.tables)
    optimizers = {load.table.name: load.optimizer for load in given.tables}
    emb = se.EmbeddingCollection(tables, optimizer=optimizers, plan=plan_of(given, world_size, shape, packing))
    batch = batch_of(given, SAMPLES, np.random.default_rng([3, rank]))
    journey, features = emb.journey, features_of(tables)
    journey.comm.tally.clear()
    ticket = journey.send(lambda: IdBatch.of(batch, features), features)
    outputs = journey.outputs(ticket)
    torch.stack([output.sum() for output in outputs.each]).sum().backward()
    sent = {stage: count for (_, stage), count in journey.comm.tally.bytes.items()}
    request = ticket.request
    return {
        "entries": [part.keys_E.numel() for part in request],
        "segments": [part.keys_E.numel() if part.offsets is None else part.offsets.numel() - 1 for part in request],
        "touched": [slab.merged()[0].numel() for slab in journey.slabs],
        "sent": [sent[what] for what in ("forward: send ids", "forward: send back", "backward: send gradients")],
    }


@pytest.mark.parametrize(
    ("ranks", "shape", "packing"),
    [
        (2, "dealt", "bag"),
        (2, "shares", "bag"),
        (3, "shares", "unique"),
        (3, "dealt", "unique"),
        (3, "blocks", "bag"),
        (4, "shares", "bag"),
        (4, "dealt", "bag"),
    ],
)
def test_owners_are_asked_for_what_the_planner_expects(ranks: int, shape: Shape, packing: Packing) -> None:
    given = workload(ranks)
    model, plan = CostModel(given, topology(ranks)), plan_of(given, ranks, shape, packing)
    found = run_ranks(ranks, counted_in_rank, shape, packing)
    for number, (table, of_table) in enumerate(zip(model.tables, plan.tables, strict=True)):
        (strip,) = of_table.layout.strips
        held = Holdings.of(strip, table.traffic.blocks([block.rows for block in strip.blocks]))
        demand = table.demand(held.asked, packing)
        for place, owner in enumerate(held.ranks.tolist()):
            expected = {
                "entries": ranks * demand.entries[place],
                "segments": ranks * demand.segments[place],
                "touched": demand.touched[place],
            }
            for what, count in expected.items():
                # Whether a row or bag is there are draws that are no more scattered than independent ones.
                assert found[owner][what][number] == pytest.approx(count, abs=SIGMAS * count**0.5), (what, table.load.table.name)
    counted = estimate(plan, given, model.topology, model)
    for rank, real in enumerate(found):
        for phase, count in zip((IDS, BACK, GRADS), real["sent"], strict=True):
            assert count == pytest.approx(counted.bytes[phase, rank], rel=0.1)  # of some 1,000 keys


def topology(ranks: int, **calls: float) -> Topology:
    """Nothing takes time but calls of these ops."""
    link = Link(float("inf"), 0.0)
    ops = {name: Op(calls.get(name, 0.0), 0.0, 0.0) for name in OPS}
    return Topology("test", ranks, ranks, 1 << 30, 0, link, link, ops)


# Calls.

OPTIMIZERS = {"narrow": se.optim.Adagrad(), "*": se.optim.RowwiseAdagrad()}
PLANS: dict[str, Any] = {
    "rows": se.row_wise(),
    "bags": se.row_wise(packing="bag"),
    "columns": se.column_wise(ranks=[0, 1]),
    "mixed": {"wide": se.column_wise(ranks=[1, 0]), "pair": se.replicated(), "narrow": se.row_wise(packing="bag")},
}
CALLS: dict[str, tuple[str, ...]] = {  # by what is wrapped: the ops that stand for it
    "route": ("route_slab",),
    "lookup": ("lookup",),
    "message": ("message",),
    "spread": ("pool_adjoint", "gather_adjoint"),
    "merge": ("merge",),
    "update": ("fused", "fused_adagrad", "fused_rowwise_adagrad"),
}


def configs() -> list[se.TableConfig]:
    return [
        se.TableConfig("wide", 90, 16),
        se.TableConfig("pair", 60, 16, feature_names=["a", "b"], pooling={"a": "sum", "b": None}),
        se.TableConfig("narrow", 50, 8, pooling="mean"),
    ]


@contextmanager
def watched() -> Iterator[Counter[str]]:
    """Counts calls of the compiled kernels of the CPU, and of what else is called once a slab."""
    kernels = compiled(torch.device("cpu"))
    assert kernels is not None, "Numba is not here"
    named = {name for name, one in vars(kernels.updating).items() if name in ("adagrad", "rowwise_adagrad") and callable(one)}
    places: list[tuple[Any, str, str]] = [
        *((kernels.routing, name, "route") for name in ("ask", "read")),
        *((kernels.packing, name, "message") for name in ("pack", "gather", "unpack")),
        (kernels.pooling, "spread", "spread"),
        *((kernels.updating, name, "update") for name in named),
        (Slab, "lookup", "lookup"),
        (ReferenceKernel, "merge", "merge"),
    ]
    calls: Counter[str] = Counter()
    originals = [getattr(owner, name) for owner, name, _ in places]

    def counting(original: Callable[..., Any], what: str) -> Callable[..., Any]:
        @wraps(original)
        def run(*arguments: Any) -> Any:
            calls[what] += 1
            return original(*arguments)

        return run

    for (owner, name, what), original in zip(places, originals, strict=True):
        setattr(owner, name, counting(original, what))
    try:
        yield calls
    finally:
        for (owner, name, _), original in zip(places, originals, strict=True):
            setattr(owner, name, original)


def calls_in_rank(rank: int, world_size: int, plan: str) -> Counter[str]:
    emb = se.EmbeddingCollection(configs(), optimizer=OPTIMIZERS, plan=PLANS[plan])
    optimizer = se.Optimizer(emb)
    numbers = np.random.default_rng([5, rank])
    batch = {name: torch.from_numpy(numbers.integers(0, 50, (40, 3))) for name in ("wide", "a", "b", "narrow")}
    with watched() as calls:
        torch.stack([output.sum() for output in emb(batch).values()]).sum().backward()
        optimizer.step()
    return calls


@pytest.mark.parametrize("plan", list(PLANS))
def test_a_step_makes_the_calls_that_the_planner_counts(plan: str) -> None:
    ranks = 2
    loads = []
    for table in configs():
        load = partial(TableLoad, table, (3.0,) * len(table.feature_names or ()))
        loads.append(load(optimizer=OPTIMIZERS.get(table.name, OPTIMIZERS["*"])))
    given, cut = Workload("calls", 40 * ranks, tuple(loads)), resolve(configs(), PLANS[plan], Cluster(ranks, ranks))
    found = run_ranks(ranks, calls_in_rank, plan)
    for what, ops in CALLS.items():
        counted = estimate(cut, given, topology(ranks, **dict.fromkeys(ops, 1.0))).seconds.sum(0)
        assert [calls[what] for calls in found] == pytest.approx(counted.tolist()), what
