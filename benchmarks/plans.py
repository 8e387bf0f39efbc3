"""The planner on many instances: how far from its own bound each plan is, and how long planning takes.

    python -m benchmarks.plans [WORKLOAD ...] [--topology h100x8] [--ranks 2 4 8] [--markdown docs/benchmarks/PAGE.md]
    python -m benchmarks.plans --only-drawn 17 23

Every workload is planned for every rank count, with loose and with tight memory; then forty instances drawn from a seed
(`benchmarks/drawn.py`). Last comes a model of 2,000 tables on 1,024 ranks, in a process of its own whose peak memory is measured.
Processor seconds are those of all threads: what planning takes where nothing else runs, on one core.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

from benchmarks.drawn import DRAWN, drawn
from benchmarks.instances import HELD, TIGHT, WORKLOADS, Instance, counted_memory, many_tables, tight
from benchmarks.pages import heading, paragraph, table
from shardembed.errors import ShardEmbedError
from shardembed.planner import plan
from shardembed.planner.result import Planned
from shardembed.planner.topology import Topology
from shardembed.planner.topology import load as load_topology
from shardembed.planner.workload import Workload
from shardembed.planner.workload import load as load_workload

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
MANY = (2000, 1024)  # tables, ranks
GIB = 1 << 30
Job = TypeVar("Job")


@dataclass(frozen=True)
class Row:
    """An instance and what planning gave.

    Attributes:
        instance: what was planned.
        limit: bytes of a rank that tables may fill.
        planned: the plan; None where there is none.
        seconds: that planning took.
        processor: seconds of all threads together.
        error: why there is no plan.
    """

    instance: Instance
    limit: float
    planned: Planned | None = None
    seconds: float = 0.0
    processor: float = 0.0
    error: str = ""

    @property
    def used(self) -> float:
        """Bytes of the fullest rank, weights and state counted from the shards."""
        planned = self.planned
        assert planned is not None
        estimate = planned.estimate
        others = estimate.memory_bytes - sum(estimate.memory[estimate.categories.index(name)] for name in HELD)
        return float((counted_memory(planned.plan, planned.workload) + others).max())

    @property
    def limiting(self) -> str:
        assert self.planned is not None
        estimate = self.planned.estimate
        return estimate.phases[int(estimate.phase_seconds.argmax())]


def both(job: tuple[Workload, Topology]) -> list[Row]:
    """Plan with loose and with tight memory; the tight limit follows from what the loose plan needs beside its tables."""
    workload, here = job
    rows = [attempt(Instance(workload, here.ranks, False), here)]
    loose = rows[0].planned
    if loose is not None:
        limit = tight(here, workload, loose.estimate)
        if limit.memory < here.memory:  # else the machines themselves are tighter
            rows.append(attempt(Instance(workload, here.ranks, True), limit))
    return rows


def attempt(instance: Instance, topology: Topology) -> Row:
    start, used = time.perf_counter(), time.process_time()
    planned, error = None, ""
    try:
        planned = plan(instance.workload, topology)
    except ShardEmbedError as refused:
        error = str(refused)
    return Row(instance, float(topology.room), planned, time.perf_counter() - start, time.process_time() - used, error)


def one_drawn(job: tuple[int, Topology]) -> list[Row]:
    """Plan the instance that is drawn from a seed with this number."""
    one = drawn(*job)
    return [attempt(Instance(one.workload, one.topology.ranks, one.tight), one.topology)]


def many(topology: Topology) -> tuple[Row, float]:
    """2,000 tables on 1,024 ranks in a process of its own: the row, and the process's peak memory in bytes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_many, args=(theirs, topology))
    child.start()
    theirs.close()
    try:
        return ours.recv()
    finally:
        child.join()


def _many(answers: Connection, topology: Topology) -> None:
    tables, ranks = MANY
    row = attempt(Instance(many_tables(tables), ranks, False), topology.scaled(ranks))
    answers.send((row, 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


HEAD = (
    "workload",
    "ranks",
    "memory",
    "step ms",
    "bound ms",
    "gap %",
    "planned in s",
    "processor s",
    "fullest rank %",
    "limiting phase",
)


def cells(row: Row) -> tuple[str, ...]:
    instance, planned = row.instance, row.planned
    first = (instance.workload.name, f"{instance.ranks:,}", f"{instance.memory}, {row.limit / GIB:.3g} GiB")
    if planned is None:
        return (*first, "does not fit", "", "", f"{row.seconds:.1f}", f"{row.processor:.1f}", "", "")
    estimate = planned.estimate
    bound, gap = planned.lower_bound_seconds, planned.gap
    return (
        *first,
        f"{1e3 * estimate.step_seconds:.3f}",
        "none proved" if bound is None else f"{1e3 * bound:.3f}",
        "" if gap is None else f"{100 * gap:.2f}",
        f"{row.seconds:.1f}",
        f"{row.processor:.1f}",
        f"{100 * row.used / row.limit:.1f}",
        row.limiting,
    )


def summary(rows: Sequence[Row]) -> str:
    planned = [row for row in rows if row.planned is not None]
    gaps = [float("inf") if row.planned.gap is None else row.planned.gap for row in planned if row.planned is not None]
    if not planned:
        return "No instance fits."
    near, close = (sum(gap <= most for gap in gaps) for most in (0.01, 0.03))
    over = sum(row.used > row.limit for row in planned)
    left = "" if len(planned) == len(rows) else f"; {len(rows) - len(planned)} do not fit into memory (below)"
    return (
        f"{len(planned)} instances planned{left}: the certified gap is at most 1 % on {near} of them ({near / len(gaps):.0%}), at "
        f"most 3 % on {close}, and {max(gaps):.2%} at most; the longest took {max(row.seconds for row in rows):.1f} s, or "
        f"{max(row.processor for row in rows):.1f} s of processors; {over} exceed their memory."
    )


def page(rows: Sequence[Row], drawn_: Sequence[Row], last: tuple[Row, float] | None) -> str:
    lines = heading("Plans and their bounds", "benchmarks.plans")
    lines += paragraph(summary([*rows, *drawn_, *([] if last is None else [last[0]])]))
    lines += paragraph(
        "Step and bound are by the planner's own cost, with the topology's published figures: what is shown is how good the",
        "search is, not how fast these machines are. No plan of the planner's space is faster than the bound.",
        f"Loose memory is the topology's. Tight memory is {TIGHT} times the tables' bytes shared evenly by all ranks, beside what",
        "the loose plan's fullest rank holds apart from tables; where the machines have no more than that, there is no tight line.",
        "The fullest rank is counted again from the plan's shards, as a share of the limit. Processor seconds are those of all",
        "threads together, which is what planning takes where nothing else runs; seconds of the clock are more on a busy machine.",
    )
    lines += table(HEAD, map(cells, rows))
    if drawn_:
        lines += [
            "",
            f"## {len(drawn_)} instances drawn from a seed",
            "",
            *paragraph(summary(drawn_)),
            *table(HEAD, map(cells, drawn_)),
        ]
    failures = [f"- {row.instance.name}: {row.error}" for row in [*rows, *drawn_] if row.error]
    if failures:
        lines += ["", "## What does not fit", "", *failures]
    if last is not None:
        row, peak = last
        lines += ["", "## 2,000 tables on 1,024 ranks", "", f"Peak memory of the process: {peak / GIB:.2f} GiB.", ""]
        lines += [*table(HEAD, [cells(row)]), *([row.error] if row.error else [])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help="workload files, or names of those that come along")
    parser.add_argument("--topology", default="h100x8")
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--no-many", action="store_true", help="leave out the 2,000 tables")
    parser.add_argument("--only-drawn", type=int, nargs="*", metavar="N", help="these of the drawn instances, and nothing else")
    parser.add_argument("--at-once", type=int, default=1, help="instances, each in a process of its own")
    parser.add_argument("--markdown", type=Path, help="also write the page here")
    args = parser.parse_args()
    topology = load_topology(args.topology)
    alone = args.only_drawn is not None
    workloads = [] if alone else [load_workload(name) for name in args.workloads]
    rows = _shown(both, [(workload, topology.scaled(count)) for workload in workloads for count in args.ranks], args.at_once)
    numbers = (args.only_drawn or range(DRAWN)) if alone else range(DRAWN * (args.workloads == list(WORKLOADS)))
    drawn_ = _shown(one_drawn, [(number, topology) for number in numbers], args.at_once)
    last = None if alone or args.no_many else many(topology)
    text = page(rows, drawn_, last)
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    return 0


def _shown(work: Callable[[Job], list[Row]], jobs: Sequence[Job], at_once: int) -> list[Row]:
    """The rows of all jobs, each printed when it is there."""
    found: list[Row] = []
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn")) if at_once > 1 else nullcontext() as pool:
        for rows in map(work, jobs) if pool is None else pool.map(work, jobs):
            for row in rows:
                print("  ".join(cells(row)), row.error[:200], flush=True)
            found += rows
    return found


if __name__ == "__main__":
    sys.exit(main())
