"""A training step: forward, backward and update of the embedding part, ours beside every peer that can make the same step."""

from __future__ import annotations

from collections import Counter

import shardembed as se
from benchmarks import limits, rounds, split, tasks
from benchmarks.contenders import KINDS
from benchmarks.jobs import Result, say
from benchmarks.options import Options
from benchmarks.roster import ONE_RANK, roster_of
from benchmarks.step_page import ABOUT, TITLE, page
from benchmarks.tasks import Task
from shardembed.planner.calibrate.stages import Runner

BATCHES = 4
__all__ = ["ABOUT", "TITLE", "measure", "page"]


def measure(options: Options) -> list[Result]:
    """All workloads under all kinds of plan that this number of ranks has. Collective."""
    results = []
    for name in options.workloads or tuple(tasks.BUILT_IN):
        task = tasks.task_of(name, _rows(name, options), options.samples)
        for kind in kinds(options):
            results.append(one(task, kind, options))
    return results


def _rows(name: str, options: Options) -> int:
    """Built-in tasks have their own size; what comes from files is cut."""
    return 1 << 62 if name in tasks.BUILT_IN else options.max_rows


def kinds(options: Options) -> tuple[str, ...]:
    return (ONE_RANK,) if se.world_size() == 1 else options.kinds or KINDS


def one(task: Task, kind: str, options: Options) -> Result:
    """One workload under one kind of plan: times by heat, contender and round, the split of our step, and the machine's limits."""
    say(f"{task.name}, {se.world_size()} rank(s), {kind}")
    roster = roster_of(task, kind, task.batches(se.rank(), BATCHES), options.full, options.wants)
    found: Result = {"workload": task.name, "size": task.describe(), "ranks": se.world_size(), "kind": kind, "heats": []}
    # A fast step needs more turns for the same certainty, and takes no longer for it.
    turns = options.rounds * (4 if task.samples <= 64 else 1)
    for heat in roster.heats():
        found["heats"].append(rounds.take_turns(heat, turns, options.steps))
        if "phases" not in found:
            found |= _split(heat[0].runner)
    return {**found, "left_out": roster.left_out}


def _split(ours: Runner | None) -> Result:
    assert ours is not None
    machine = limits.measure(max(spec.width for spec in ours.emb.journey.specs))
    packings = Counter(table.packing for table in ours.emb.journey.plan.tables)
    return {"limits": machine.__dict__, "phases": split.as_json(split.split(ours, machine)), "packings": packings}
