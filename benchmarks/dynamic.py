"""A training step of a dynamic table, beside a dense one of as many rows and TorchRec's managed collisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import shardembed as se
from benchmarks import dynamic_step, pages
from benchmarks.crew import Crew, CrewError, Make
from benchmarks.dynamic_step import NEW, STRANGERS, Timed, median, ours, zch
from benchmarks.figures import ratio, spread
from benchmarks.jobs import Result, say
from benchmarks.options import Options
from benchmarks.tasks import START, Task
from shardembed.optim import RowwiseAdagrad
from shardembed.planner.workload import TableLoad, Workload, Zipf
from shardembed.tables.table_config import TableConfig

TITLE = "A training step with a dynamic table"
DENSE = "dense, rows in random order"
ROWS, COLUMNS, SAMPLES, IDS, EXPONENT = 1_000_000, 64, 4096, 20, 1.05
MODES = {"warm": "all ids have rows", "newcomers": f"{NEW:.1%} of the distinct ids of a batch have never come"}
UNCOUNTED = 2
STAGES = {"find": "find ids", "bring": "accumulate", "commit": "commit ids"}
ABOUT = (
    f"One table of {ROWS:,} rows and {COLUMNS} columns, {SAMPLES:,} samples of {IDS} ids a rank, summed, ids by Zipf's law with "
    f"exponent {EXPONENT:g}; rowwise Adagrad, everything else by default. Ids are random 64-bit numbers; the dense table has the "
    "same as rows in random order, and once more with the popular rows side by side, as ids sorted by popularity lie. Tables are "
    f"full before the first step is timed: each of the {ROWS:,} ids has come once, in random order, and to those with a limit "
    f"{STRANGERS:.0%} more beside them. Every contender has processes of its own, one a rank, which take turns on the same "
    "batches; the first two steps of a turn are not counted. A step is forward, backward, update and `zero_grad`, from raw "
    "tensors. Times are medians in milliseconds: by the clock, and of processor time, rank 0's, which says more where others work "
    "on the machine. Ratios are medians of the ratios of single steps to those of the dense table, in the same round on the same "
    "batch. find, bring and commit are stages of ours, in processor time: ids to rows in the forward and in the backward, and what "
    "the step makes of ids. TorchRec's map stands in front of its sharded table, which gives whom it lets in the row as it was "
    "left; with a step of 50 between two looks at who came, newcomers share one row until then."
)


def collect(options: Options, words: Sequence[str]) -> list[Result]:
    del words
    return [one(ranks, options) for ranks in options.ranks]


def task_of(options: Options) -> Task:
    samples = options.samples or SAMPLES
    table = TableConfig("t", ROWS, COLUMNS, pooling="sum", init=START)
    load = TableLoad(table, (float(IDS),), Zipf(EXPONENT), "sorted", optimizer=RowwiseAdagrad(lr=0.01))
    return Task(Workload("dynamic", samples, (load,)), samples)


def entries(task: Task, ranks: int) -> dict[str, Make]:
    rows = task.tables[0].num_embeddings
    found: dict[str, Make] = {
        DENSE: partial(ours, task, None, False),
        "dense, rows by popularity": partial(ours, task, None, True),
        "dynamic, growing": partial(ours, task, (se.Dynamic(), None), False),
        "dynamic, LRU": partial(ours, task, (se.Dynamic(eviction=se.LRU()), rows), False),
        "dynamic, LFU": partial(ours, task, (se.Dynamic(eviction=se.LFU()), rows), False),
    }
    for policy in ("LRU", "LFU", "DistanceLFU") if ranks == 1 else ("LRU",):
        found[f"TorchRec ZCH, {policy}, each step"] = partial(zch, task, policy, 1)
    if ranks == 1:
        found["TorchRec ZCH, LRU, each 50th step"] = partial(zch, task, "LRU", 50)
    return found


def one(ranks: int, options: Options) -> Result:
    """Times by mode and contender, on so many ranks."""
    task = task_of(options)
    left_out: dict[str, str] = {}
    with ExitStack() as stack:
        crews: dict[str, Crew] = {}
        for name, make in entries(task, ranks).items():
            if name != DENSE and not options.wants(name):
                continue
            say(f"{ranks} rank(s): {name}")
            try:
                crews[name] = stack.enter_context(closing(Crew.start(make, task, ranks)))
            except CrewError as error:
                if "ZCH" not in name:
                    raise
                left_out[name] = error.args[0].split(" with arguments")[0]
        times = {mode: take_turns(crews, options, mode) for mode in MODES}
        memory = {name: [sum(part) for part in zip(*crew.do(dynamic_step.memory), strict=True)] for name, crew in crews.items()}
    return {"ranks": ranks, "times": times, "memory": memory, "left_out": left_out}


def take_turns(crews: Mapping[str, Crew], options: Options, mode: str) -> dict[str, list[Any]]:
    """Of rank 0, round by round; slow peers sit most rounds out."""
    found: dict[str, list[Any]] = {name: [] for name in crews}
    for number in range(options.rounds):
        first = 1 + number * (UNCOUNTED + options.steps)
        numbers = range(first, first + UNCOUNTED + options.steps)
        asked = [-at if mode == "warm" else at for at in numbers]
        for name in list(crews) if number % 2 else reversed(list(crews)):
            runs = "each step" not in name or number % 5 == 0
            found[name] += crews[name].do(dynamic_step.turn, asked, UNCOUNTED)[0] if runs else [None] * options.steps
    return found


def page(results: list[Result], path: Path | None) -> list[str]:
    del path
    lines: list[str] = []
    for result in results:
        for mode, meaning in MODES.items():
            ranks = f"{result['ranks']} rank{'s' * (result['ranks'] > 1)}"
            lines += [f"## {mode.capitalize()}, {ranks}: {meaning}", "", *_table(result["times"][mode]), ""]
        lines += [*_memory(result), ""]
        lines += [*(f"- Left out: {name}: {reason}" for name, reason in result["left_out"].items()), ""]
    return lines


def _table(times: Mapping[str, Sequence[Timed | None]]) -> list[str]:
    cpu, wall = (
        {name: [None if t is None else getattr(t, kind) for t in found] for name, found in times.items()}
        for kind in ("cpu", "wall")
    )
    rows = []
    for name, found in times.items():
        ran = [one for one in found if one is not None]
        stages = {short: median([one.stages.get(stage, 0.0) for one in ran]) for short, stage in STAGES.items()}
        mine = "dynamic" in name
        spent = spread(cpu[name])
        rows.append(
            [
                name,
                f"{spread(wall[name]).median:.2f}",
                f"{spent.median:.2f} ({spent.low:.2f} to {spent.high:.2f})",
                f"{ratio(wall[name], wall[DENSE]).median:.2f}",
                f"**{ratio(cpu[name], cpu[DENSE]):.2f}**",
                f"{spent.least / spread(cpu[DENSE]).least:.2f}",
                *(f"{ms:.2f}" if mine else "" for ms in stages.values()),
                f"{(stages['find'] + stages['bring']) / spent.median:.0%}" if mine else "",
            ]
        )
    head = ["contender", "ms", "processor ms", "ms to dense", "processor to dense", "least / least", *STAGES, "find and bring"]
    return pages.table(head, rows)


def _memory(result: Result) -> list[str]:
    rows = [
        [name, f"{living:,}", f"{taken / living:.1f}", f"{evicted:,}"]
        for name, (living, taken, evicted) in result["memory"].items()
        if living
    ]
    return pages.table(["dynamic table at the end", "ids", "bytes an id beside row and state", "evicted so far"], rows)


def as_json(results: list[Result]) -> dict[str, Any]:
    """All figures."""
    plain = [
        {
            **result,
            "times": {
                mode: {n: [t and t.__dict__ for t in found] for n, found in by.items()} for mode, by in result["times"].items()
            },
        }
        for result in results
    ]
    return {"results": plain}
