"""The planner's byte counts against what real ranks send and hold.

All ranks look up the same ids, so that expected counts can be exact: what one rank asks is then what every rank asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import shardembed as se
from shardembed.planner.cost import CostModel, estimate
from shardembed.planner.cost_ops import OPS
from shardembed.planner.cost_phases import BACK, COPIES, GRADS, IDS, STATE, UPDATE, WEIGHTS
from shardembed.planner.cuts import dealt
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.traffic import Asked, Traffic
from shardembed.planner.workload import TableLoad, Workload, Zipf
from shardembed.tables.layout import Layout, Shard
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import Plan, TablePlan
from shardembed.wire.header import HEADER_BYTES, SLAB_COUNTS_BYTES
from shardembed.wire.message import ALIGNMENT
from tests.harness import run_ranks

BAGS, LONG = 12, 60

STAGES = ("forward: send ids", "forward: send back", "backward: send gradients", "step: share row squares", "step: reduce copies")


def tables() -> list[se.TableConfig]:
    """Bags of one id and of many, sequences, a shared table, and every way to be updated that sends or holds something.

    Strips stay multiples of 16 bytes on any wire, so that vectors need no padding.
    """
    return [
        se.TableConfig("long", 600, 32),
        se.TableConfig("single", 400, 16),
        se.TableConfig("sequence", 500, 48, pooling=None),
        se.TableConfig("shared", 300, 32, feature_names=["shared", "shared too"], pooling="mean"),
        se.TableConfig("counted", 200, 16, scale_grad_by_freq=True),
        se.TableConfig("frozen", 200, 32, frozen=True),
    ]


OPTIMIZERS = {"long": se.optim.RowwiseAdagrad(), "shared": se.optim.Adagrad(), "*": se.optim.Adam()}
PLANS: dict[str, Any] = {
    "rows by id": se.row_wise(strided=False),
    "rows by bag": se.row_wise(strided=False, packing="bag"),
    "dealt": se.row_wise(packing="bag"),
    "columns": se.column_wise(ranks=[0, 1]),
    "columns by bag": se.column_wise(ranks=[1, 0], packing="bag"),
    "mixed": {
        "long": se.column_wise(ranks=[0, 1], packing="bag"),
        "single": se.replicated(),
        "sequence": se.grid(2, ranks=[0, 1, 1, 0]),
        "shared": se.table_wise(1),
        "counted": se.row_wise(bounds=[30], ranks=[1, 0]),
        "frozen": se.replicated(),
    },
}


def plan_in_shares(ranks: int) -> Plan:
    """Rows of all tables dealt out in unequal shares, so that ranks own several residues of a table; by bag and by id."""
    plans = []
    for number, table in enumerate(tables()):
        load = TableLoad(table, (1.0,) * len(table.feature_names or ()), Zipf(1.05), "sorted")
        shards = dealt(load, range(ranks), [2 + (rank + number) % 2 for rank in range(ranks)])
        assert len(shards) > ranks
        layout = Layout(table.num_embeddings, table.embedding_dim, tuple(shards))
        plans.append(TablePlan(table.name, layout, "unique" if table.name == "single" else "bag"))
    return Plan(tuple(plans), ranks)


def ids_of(name: str, rows: int, length: int) -> torch.Tensor:
    """`[BAGS, length]`, drawn alike on every rank; long bags reach every block of any cut used here."""
    drawn = torch.randint(0, rows, (BAGS, length), generator=torch.Generator().manual_seed(len(name)))
    if length >= 6:
        drawn[:, :6] = torch.tensor([0, 1, 2, rows - 3, rows - 2, rows - 1])  # both residues, both halves
    return drawn


def batch() -> dict[str, torch.Tensor]:
    lengths = {"single": 1, "counted": 1}
    return {
        name: ids_of(name, table.num_embeddings, lengths.get(table.name, LONG))
        for table in tables()
        for name in table.feature_names or ()
    }


def step_in_rank(rank: int, world_size: int, plan: str, wire: torch.dtype | None) -> dict[str, Any]:
    """One step: bytes sent by stage, and bytes of weights and state."""
    given = plan_in_shares(world_size) if plan == "shares" else PLANS[plan]
    emb = se.EmbeddingCollection(tables(), optimizer=OPTIMIZERS, plan=given, wire_dtype=wire)
    optimizer = se.Optimizer(emb)
    emb.journey.comm.tally.clear()
    torch.stack([out.double().sum() for out in emb(batch()).values()]).sum().backward()
    optimizer.step()
    sent = dict.fromkeys(STAGES, 0)
    for (_, stage), count in emb.journey.comm.tally.bytes.items():
        sent[stage] = sent.get(stage, 0) + count
    return {
        "sent": sent,
        "slabs": len(emb.journey.specs),
        "slots": emb.journey.comm.history.slots,
        "weights": sum(slab.weights.nbytes for slab in emb.journey.slabs),
        "state": sum(state.nbytes for slab in emb.journey.slabs for state in slab.state.values()),
        "plan": emb.plan,
    }


class Exact(Traffic):
    """Counts of one batch that all ranks share."""

    drawn: torch.Tensor

    @staticmethod
    def count(load: TableLoad, drawn: Sequence[torch.Tensor]) -> Exact:
        found = Exact.__new__(Exact)
        together = torch.cat([ids.flatten() for ids in drawn])
        distinct = float(together.unique().numel())
        fields = {"rows": load.table.num_embeddings, "ids": float(together.numel()), "distinct": distinct, "touched": distinct}
        shape = {"bags": tuple(float(len(ids)) for ids in drawn), "lengths": tuple(float(ids.shape[1]) for ids in drawn)}
        for name, value in {**fields, **shape, "drawn": together}.items():
            object.__setattr__(found, name, value)
        return found

    def blocks(self, rows: Sequence[range]) -> Asked:
        inside = [[i for i in self.drawn.tolist() if i in block] for block in rows]
        ids, distinct = np.array([float(len(part)) for part in inside]), np.array([float(len(set(part))) for part in inside])
        return Asked(ids, distinct, distinct)


def model_of(ranks: int, wire: torch.dtype | None) -> CostModel:
    drawn = batch()
    loads = []
    for table in tables():
        lengths = tuple(float(drawn[name].shape[1]) for name in table.feature_names or ())
        loads.append(TableLoad(table, lengths, optimizer=OPTIMIZERS.get(table.name, OPTIMIZERS["*"])))
    link = Link(1e9, 1e-6)
    topology = Topology("test", ranks, ranks, 1 << 30, 0, link, link, {name: Op(0.0, 0.0, 0.0) for name in OPS})
    model = CostModel(Workload("test", BAGS * ranks, tuple(loads), wire), topology)
    counted = [Exact.count(table.load, [drawn[name] for name in table.load.table.feature_names or ()]) for table in model.tables]
    model.tables = tuple(replace(table, traffic=traffic) for table, traffic in zip(model.tables, counted, strict=True))
    return model


@pytest.mark.parametrize(
    ("plan", "ranks", "wire"),
    [
        ("rows by id", 2, None),
        ("rows by bag", 2, torch.bfloat16),
        ("rows by bag", 3, None),
        ("dealt", 2, None),
        ("dealt", 4, None),
        ("shares", 2, torch.bfloat16),
        ("shares", 3, None),
        ("columns", 2, None),
        ("columns by bag", 3, None),
        ("mixed", 2, torch.bfloat16),
        ("mixed", 3, None),
        ("rows by id", 2, torch.int8),
        ("columns by bag", 3, torch.int8),
    ],
)
def test_a_rank_sends_and_holds_what_the_planner_counts(plan: str, ranks: int, wire: torch.dtype | None) -> None:
    model = model_of(ranks, wire)
    found = run_ranks(ranks, step_in_rank, plan, wire)
    expected = estimate(found[0]["plan"], model.workload, model.topology, model)
    slabs = found[0]["slabs"]
    for rank, real in enumerate(found):
        sent, counted = real["sent"], expected.bytes[:, rank]
        counts = (ranks - 1) * (HEADER_BYTES + SLAB_COUNTS_BYTES * slabs)
        assert sent["forward: counts"] == counts + (ranks - 1) * SLAB_COUNTS_BYTES * (real["slots"] - slabs)
        keys = counted[IDS] - counts
        # Keys, lengths and multiplicities have a block each, filled up to 16 bytes.
        assert keys - 1 <= sent["forward: send ids"] < keys + (ALIGNMENT - 1) * 3 * slabs * (ranks - 1) + 1
        # Rows of 8 bits do not fill 16 bytes; what a block is filled up with is counted at its expected size.
        off = 1 + (ALIGNMENT * slabs * (ranks - 1) if wire == torch.int8 else 0)
        assert sent["forward: send back"] == pytest.approx(counted[BACK], abs=off)
        assert sent["backward: send gradients"] == pytest.approx(counted[GRADS], abs=off)
        assert sent["step: share row squares"] == pytest.approx(counted[UPDATE], abs=1)
        assert sent["step: reduce copies"] * 2 * (ranks - 1) / ranks == pytest.approx(counted[COPIES])
        assert real["weights"] == expected.memory[WEIGHTS, rank]
        assert real["state"] == expected.memory[STATE, rank]
    assert expected.table_memory.sum(0) == pytest.approx(expected.memory[[WEIGHTS, STATE]].sum(0))


def test_the_plan_may_hold_a_table_whole_on_one_rank() -> None:
    model = model_of(1, None)
    whole = [Layout(t.rows, t.width, (Shard(range(t.rows), range(t.width), (0,)),)) for t in model.tables]
    plan = Plan(tuple(TablePlan(t.load.table.name, layout) for t, layout in zip(model.tables, whole, strict=True)), 1)
    assert Cluster(1, 1).node(0) == (0,)
    assert not estimate(plan, model.workload, model.topology, model).bytes.any(), "one rank sends nothing"
