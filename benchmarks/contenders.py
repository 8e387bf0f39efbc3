"""What takes part in a benchmark: a training step of one task under one kind of plan, with batches as it likes them. Ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

import shardembed as se
from benchmarks.formulas import cheaper_packing
from benchmarks.tasks import Batch, Task
from shardembed.planner.calibrate.stages import Case, Runner
from shardembed.tables.placement import Cluster, Packing, Placement
from shardembed.tables.plan import Plan, resolve

OURS = "shardembed"  # the contender that the others are compared with
KINDS = ("row_wise", "table_wise", "column_wise", "mixed")


@dataclass(frozen=True)
class Contender:
    """A training step. every: rounds between its turns, for one that is much slower than all others.

    ahead: gives batches as the model's call takes them, for steps whose ids are sent while the step before computes.
    """

    name: str
    step: Callable[[Any], None]
    batches: Sequence[Any]
    every: int = 1
    ahead: Callable[[Sequence[Any]], Iterator[Any]] | None = None
    runner: Runner | None = None


# Plans.


def placement(kind: str, number: int, ranks: int, packing: Packing | None, strided: bool = True) -> Placement:
    """Where table `number` lies. mixed: a third of the tables each way.

    strided: rows are dealt out in turn, so that popular ones, which come first, lie on all ranks; else in one block a rank.
    """
    if kind == "mixed":
        return placement(KINDS[number % 3], number // 3, ranks, packing, strided)
    if kind == "row_wise":
        return se.row_wise(strided=strided, packing=packing)
    if kind == "table_wise":
        return se.table_wise(number % ranks, packing=packing)
    return se.column_wise(packing=packing)


def plan_of(task: Task, kind: str, ranks: int, packing: Packing | None, strided: bool = True) -> Plan:
    """packing: None takes for each table the one that sends fewer bytes."""
    chosen = {table.name: placement(kind, i, ranks, packing, strided) for i, table in enumerate(task.tables)}
    plan = resolve(task.tables, chosen, Cluster(ranks, ranks))
    return plan if packing else cheaper_packing(task.workload, plan, task.samples)


# Ours.


def ours(
    task: Task, plan: Plan, batches: Sequence[Batch], wire_dtype: torch.dtype | None = None, from_dict: bool = False
) -> Contender:
    """A training step of ours. from_dict: on dicts of tensors; else they have been read before, as peers' batches have."""
    workload = replace(task.workload, wire_dtype=wire_dtype)
    runner = Runner(Case(task.name, workload, plan), list(batches), join_small=True)
    if not from_dict:
        runner.batches = [se.IdBatch.of(batch, runner.emb.features) for batch in batches]
    return Contender(OURS, runner.learn, runner.batches, runner=runner)


def prefetching(task: Task, plan: Plan, batches: Sequence[Batch], wire_dtype: torch.dtype | None = None) -> Contender | str:
    """As `ours`, with the ids of a batch sent while the one before it computes."""
    prefetched = getattr(se, "prefetched", None)
    if prefetched is None:
        return "this version has no se.prefetched"
    made = ours(task, plan, batches, wire_dtype)
    assert made.runner is not None
    emb = made.runner.emb
    return replace(made, ahead=lambda batches: iter(prefetched(batches, emb)))
