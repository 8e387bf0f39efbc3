"""How the planner says that copies share their gradients against a real step: the way, and the bytes.

Every rank asks for so many different rows, so that expected counts can be exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.comm.sharing import OPENING
from shardembed.comm.tag import ROW, TAG
from shardembed.planner import cost_copies
from shardembed.planner.cost import CostModel, estimate
from shardembed.planner.cost_ops import OPS
from shardembed.planner.cost_phases import COPIES
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.workload import TableLoad, Workload
from shardembed.store import reductions
from tests.harness import run_ranks

STAGE = "step: reduce copies"
SAMPLES = 720
Shape = tuple[int, int, str, bool]  # rows, columns, dtype, frozen

CASES: dict[str, tuple[int, tuple[Shape, ...], str]] = {  # ranks, tables, the way
    "one of few rows": (3, ((1900, 33, "float32", False),), "whole, not counted"),
    "a rank's rows, twice, are fewer": (2, ((2000, 32, "float32", False),), "rows"),
    "a rank's rows, three times, are more": (3, ((2100, 32, "float32", False),), "whole"),
    "a large one takes a small one along": (3, ((5000, 24, "float32", False), (800, 8, "float32", False)), "rows"),
    "a small one keeps a large one": (2, ((1500, 32, "float32", False), (730, 96, "float32", False)), "whole"),
    "numbers as wide as the widest": (2, ((1500, 20, "float32", False), (1000, 16, "float64", False)), "whole"),
    "wide rows": (2, ((4000, 12, "float64", False), (2000, 16, "float32", False)), "rows"),
    "rows that learn nothing are not shared": (2, ((5000, 32, "float32", True), (900, 16, "float32", False)), "whole, not counted"),
    "computed wider than stored": (2, ((3000, 32, "bfloat16", False),), "rows"),
}


def tables_of(case: str) -> list[se.TableConfig]:
    return [
        se.TableConfig(f"t{number}", rows, width, dtype=getattr(torch, dtype), frozen=frozen)
        for number, (rows, width, dtype, frozen) in enumerate(CASES[case][1])
    ]


def step_in_rank(rank: int, world_size: int, case: str) -> dict[str, Any]:
    """One step: bytes sent by stage, and calls."""
    emb = se.EmbeddingCollection(tables_of(case), optimizer=se.optim.SGD(lr=0.1), plan=se.replicated())
    optimizer = se.Optimizer(emb)
    batch = {}
    for table in tables_of(case):
        rows = torch.randperm(table.num_embeddings, generator=torch.Generator().manual_seed(rank))
        batch[table.name] = rows[:SAMPLES, None]
    tally = emb.journey.comm.tally
    tally.clear()
    torch.stack([out.double().sum() for out in emb(batch).values()]).sum().backward()
    optimizer.step()
    return {"sent": {stage: count for (_, stage), count in tally.bytes.items()}, "calls": [*tally.calls], "plan": emb.plan}


@pytest.mark.parametrize("case", list(CASES))
def test_copies_go_the_way_that_the_planner_counts(case: str) -> None:
    ranks, _, way = CASES[case]
    loads = tuple(TableLoad(table, (1.0,), optimizer=se.optim.SGD(lr=0.1)) for table in tables_of(case))
    link = Link(1e9, 1e-6)
    here = Topology("test", ranks, ranks, 1 << 30, 0, link, link, {name: Op(0.0, 0.0, 0.0) for name in OPS})
    model = CostModel(Workload("copies", SAMPLES * ranks, loads), here)
    asked = {"ids": float(SAMPLES), "distinct": float(SAMPLES)}
    model.tables = tuple(replace(table, traffic=replace(table.traffic, **asked)) for table in model.tables)
    found = run_ranks(ranks, step_in_rank, case)
    shared = model.copies.shared(model.tables)
    assert f"{shared.way}{'' if shared.counted else ', not counted'}" == way
    expected = estimate(found[0]["plan"], model.workload, here, model)
    for rank, real in enumerate(found):
        calls = {kind for kind, stage in real["calls"] if stage == STAGE}
        assert calls == {"all_to_all" if shared.way == "rows" else "all_reduce"}
        assert (f"{STAGE}, counts" in real["sent"]) == shared.counted
        travelled = 1 if shared.way == "rows" else 2 * (ranks - 1) / ranks  # an all-reduce tells of its buffer
        sent = real["sent"][STAGE] * travelled + real["sent"].get(f"{STAGE}, counts", 0)
        assert sent == pytest.approx(expected.bytes[COPIES, rank])


def test_the_planner_knows_what_it_may_not_import() -> None:
    assert (cost_copies.TAG_ELEMENTS, cost_copies.COUNTED_BYTES) == (TAG, reductions.COUNTED)
    assert (cost_copies.COUNTS_OPENING, cost_copies.COUNTS_ROW) == (OPENING, ROW)
