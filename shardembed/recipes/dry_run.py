"""What a job would do: its data are read and checked, its tables planned for a number of ranks, their memory counted. Nothing is
trained, no rank started and no file written. Of clicks with tables without a limit a second reading counts the ids.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from shardembed import planner
from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.errors import PlanError
from shardembed.modules.auto import ask_planner, topology_of, wants_planning, workload_of
from shardembed.observe.tables import bytes_text
from shardembed.planner.cost import Estimate
from shardembed.recipes import report
from shardembed.recipes.build import placements
from shardembed.recipes.common import JobConfig
from shardembed.recipes.data.plausible import free_memory
from shardembed.recipes.task import Task
from shardembed.recipes.tasks import prepare
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import Plan, resolve
from shardembed.tables.settings import Settings

CPU = torch.device("cpu")


def run(config: JobConfig, console: Console, ranks: int) -> dict[str, Any]:
    """Returns what a script would read.

    Raises:
        DataError, PlanError: what the job would end with before its first step.
    """
    task = prepare(config, Comm.of())
    report.show_warnings(console, task.warnings())
    ids = task.counted_ids()
    plan, estimate = planned(task, ranks, ids)
    tables = task.tables()
    held = report.holdings(plan, tables, config, ids)
    report.show_start(console, config, task.described(), plan, held, tables)
    fullest = int(estimate.memory_bytes.argmax())
    parts = {name: float(size) for name, size in zip(estimate.categories, estimate.memory[:, fullest], strict=True)}
    total = sum(parts.values())
    console.print(f"memory of rank {fullest}, which has most: {bytes_text(total)}", highlight=False)
    for name, size in parts.items():
        if size:
            console.print(f"  {name}: {bytes_text(size)}", highlight=False)
    if unlimited := [table for table in tables if table.grows]:
        found = sum(ids[table.name] for table in unlimited)
        console.print(f"  tables without a limit count here with the {found:,} ids of the data", soft_wrap=True, highlight=False)
    needed, free = float(estimate.memory_bytes.sum()), free_memory()
    if default_device() == CPU and needed > free:
        together = f"the {ranks} ranks together need {bytes_text(needed)}" if ranks > 1 else f"that is {bytes_text(needed)}"
        report.show_warnings(
            console, [f"warning: {together}, but this machine has {bytes_text(free)} of memory free: the job does not fit on it"]
        )
    console.print(f"{task.steps:,} steps in {config.train.epochs} epoch(s); nothing was trained", highlight=False)
    return {
        "ranks": ranks,
        "steps": task.steps,
        "training_rows": task.training_rows,
        "workers": task.workers,
        "dropped_rows": task.dropped.kinds,
        "memory": [{"weights": one.weights, "state": one.state} for one in held],
        "fullest_rank": {"rank": fullest, "bytes": total, **parts},
        "tables": {
            table.name: {"rows": table.num_embeddings, "cut": part.kind} for table, part in zip(tables, plan.tables, strict=True)
        },
    }


def planned(task: Task, ranks: int, ids: Mapping[str, int]) -> tuple[Plan, Estimate]:
    """The plan that the job would have, and what it takes; ids: how many each table without a limit will have."""
    config = task.config
    wanted = placements(config)
    tables, cluster = tuple(task.tables()), Cluster(ranks, ranks)
    wire_dtype = getattr(torch, config.wire_dtype) if config.wire_dtype else None
    settings, optimizers = Settings(wire_dtype), [config.optimizer.tables.build()] * len(tables)
    plan = resolve(tables, wanted or "auto", cluster)
    if wants_planning(tables, wanted or "auto", cluster):
        answer = json.loads(ask_planner(tables, optimizers, settings, plan, frozenset(wanted), cluster, CPU))
        if "error" in answer:
            raise PlanError(answer["error"])
        plan = Plan.from_json(answer["plan"])
    workload = workload_of(tables, optimizers, settings, ranks)
    loads = tuple(replace(load, ids=ids[load.table.name] if load.table.grows else None) for load in workload.tables)
    workload = replace(workload, tables=loads, global_batch_size=max(ranks, config.train.global_batch_size))
    return plan, planner.estimate(plan, workload, topology_of(cluster, CPU))
