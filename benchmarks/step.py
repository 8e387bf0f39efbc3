"""A training step: forward, backward and update of the embedding part, ours beside every peer that can make the same step."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import rounds, split, tasks
from benchmarks.contenders import KINDS, OURS
from benchmarks.jobs import Result, say
from benchmarks.options import Options
from benchmarks.roster import ONE_RANK, roster_of
from benchmarks.step_page import ABOUT, TITLE, page
from benchmarks.tasks import Task

__all__ = ["ABOUT", "TITLE", "collect", "page"]


def collect(options: Options, words: Sequence[str]) -> list[Result]:
    """All workloads under all kinds of plan, on each number of ranks."""
    del words
    results = []
    for ranks in options.ranks:
        for name in options.workloads or tuple(tasks.BUILT_IN):
            task = tasks.task_of(name, _rows(name, options), options.samples)
            results += [one(task, kind, ranks, options) for kind in kinds(ranks, options)]
    return results


def _rows(name: str, options: Options) -> int:
    """Built-in tasks have their own size; what comes from files is cut."""
    return 1 << 62 if name in tasks.BUILT_IN else options.max_rows


def kinds(ranks: int, options: Options) -> tuple[str, ...]:
    return (ONE_RANK,) if ranks == 1 else options.kinds or KINDS


def one(task: Task, kind: str, ranks: int, options: Options) -> Result:
    """One workload under one kind of plan: times by heat, contender and step, the phases of our step, and the machine's limits."""
    say(f"{task.name}, {ranks} rank(s), {kind}")
    roster = roster_of(task, kind, ranks, options.full, options.wants, options.keep_memory)
    found: Result = {"workload": task.name, "size": task.describe(), "ranks": ranks, "kind": kind, "heats": []}
    # A fast step needs more turns for the same certainty, and takes no longer for it.
    turns = options.rounds * (4 if task.samples <= 64 else 1)
    for heat in roster.heats():
        found["heats"].append(rounds.take_turns(heat, turns, options.steps, roster.every))
        if "phases" not in found:
            found |= heat[OURS].do(split.measured)[0]
    return {**found, "left_out": roster.left_out}
