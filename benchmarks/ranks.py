"""A rank's own work a step, against the number of ranks: simulated, without a network (`own_work`), beside TorchRec's likewise."""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import shardembed as se
from benchmarks import jobs, launches, own_work, pages, peer_ranks, plots
from benchmarks.figures import Spread
from benchmarks.jobs import Result
from benchmarks.options import Options
from benchmarks.own_work import PARTS, Case, Rank
from shardembed.tables.placement import Packing

TITLE = "A rank's own work"
WHERE = "one process, one thread, no network"
OURS, TORCHREC = "shardembed", peer_ranks.NAME
ROWS, SAMPLES = 12_800, 256
FEW = 2  # samples where operators are counted: Triton's interpreter takes seconds, and the count is the same for all
ABOUT = (
    "A step (forward, backward, rowwise Adagrad) of one rank of as many as are said, over exchanges that hand back what is sent: "
    "so each other rank asks of this one what this one asks of it. Tables have "
    f"{own_work.WIDTH} columns and are cut by rows, {ROWS:,} of each on every rank; ids are uniform, {SAMPLES} samples a rank if "
    "`--samples` does not say otherwise. A step thus does the same on any number of ranks, and what grows with it is overhead. "
    "Milliseconds are of the process on the processor, the least of all timed steps; all numbers of ranks of a case take turns. "
    "Operators and host syncs are of the way that CUDA devices take, counted on the CPU with its compiled kernels switched off, at "
    f"{FEW} samples (`benchmarks/launches.py`)."
)
MOST_BLOCKS = 300_000  # of a plan; more take a minute and a gigabyte to build
NEAR, FAR = 8, 1024  # numbers of ranks that are compared
TABLES, SLABS = 26, 4
USUAL: tuple[tuple[Packing, int], ...] = (("unique", 1), ("unique", 10), ("bag", 1), ("bag", 10))
SHAPES = ((TABLES, 1), (TABLES, 10), (8, SLABS), (200, SLABS))  # tables, slabs
ON_SHAPES: tuple[tuple[Packing, int], ...] = (("unique", 1), ("bag", 10))
CASE = ("tables", "slabs", "ids", "packing")  # the keys that say which case a point is of


def cases(samples: int) -> list[Case]:
    found = [Case(TABLES, SLABS, ROWS, samples, ids, packing) for packing, ids in USUAL]
    return found + [Case(*shape, ROWS, samples, ids, packing) for shape in SHAPES for packing, ids in ON_SHAPES]


def collect(options: Options, words: list[str]) -> list[Result]:
    """All numbers of ranks in this process, which is a rank on its own."""
    del words
    torch.set_num_threads(1)
    se.init(keep_memory=options.keep_memory)
    return measure(options)


def measure(options: Options) -> list[Result]:
    """A point for each case and number of ranks; behind ours TorchRec's."""
    os.environ["TRITON_INTERPRET"] = "1"  # for the counting, before Triton is imported
    ranks, samples = [number for number in options.ranks if number > 1], options.samples or SAMPLES
    found: list[Result] = []
    for case in cases(samples):
        if options.wants(f"{OURS}, {case.name}"):
            jobs.say(case.name)
            found += in_turns(case, ranks, options)
    for ids in sorted({ids for _, ids in USUAL}):
        case = Case(TABLES, 1, ROWS, samples, ids, "bag")
        for number in ranks:
            if number <= peer_ranks.MOST_RANKS and options.wants(f"{TORCHREC}, {ids} ids"):
                jobs.say(f"{TORCHREC}, {number} ranks, ids a sample: {ids}")
                found.append(_peer(case, number, options))
    return found


def in_turns(case: Case, ranks: Iterable[int], options: Options) -> list[Result]:
    """The points of a case: in each round, each number of ranks a step that is not timed, and then some that are."""
    members = {number: Rank(case, number) for number in ranks if case.tables * number <= MOST_BLOCKS}
    gc.collect()
    gc.freeze()  # a plan for thousands of ranks is a million objects, and to walk them is no part of a step
    seconds: dict[int, list[own_work.Figures]] = {number: [] for number in members}
    for number in range(-1, options.rounds):  # the first round compiles and warms up
        for number_of_ranks, rank in members.items():
            first = (number + 1) * (options.steps + 1)
            taken = [rank.step(first + step) for step in range(options.steps + 1)]
            if number >= 0:
                seconds[number_of_ranks] += taken[1:]
    points = []
    for number, steps in seconds.items():
        counted = launches.count(replace(case, samples=FEW), number)
        points.append(point(case, number, steps, operators=counted.operators, host_syncs=counted.host_syncs))
    return points


def point(case: Case, ranks: int, steps: Sequence[own_work.Figures], who: str = OURS, **more: Any) -> Result:
    """One figure of the page. Its parts are those of the fastest step, so that they add up."""
    least = min(steps, key=lambda step: sum(step.values()))
    return {
        "who": who,
        "ranks": ranks,
        "packing": case.packing,
        "ids": case.ids,
        "slabs": case.slabs,
        "tables": case.tables,
        "milliseconds": 1e3 * sum(least.values()),
        **more,
        "samples": case.samples,
        "median": 1e3 * statistics.median(sum(step.values()) for step in steps),
        "parts": {part: 1e3 * seconds for part, seconds in least.items()},
    }


def _peer(case: Case, ranks: int, options: Options) -> Result:
    steps = peer_ranks.in_a_process(case, ranks, options)
    if isinstance(steps, str):
        return {"who": TORCHREC, "ranks": ranks, "ids": case.ids, "left_out": steps}
    return point(case, ranks, steps, TORCHREC)


def as_json(results: list[Result]) -> dict[str, list[Result]]:
    """points: ours. peers: likewise, without what only ours has."""
    return {"points": _of(results, OURS), "peers": [result for result in results if result["who"] != OURS]}


def _of(results: list[Result], who: str) -> list[Result]:
    return [result for result in results if result["who"] == who and "left_out" not in result]


# The page.


def page(results: list[Result], path: Path | None) -> list[str]:
    ours, theirs = _by_case(_of(results, OURS)), _by_case(_of(results, TORCHREC))
    lines: list[str] = []
    if path and ours:
        name = plots.with_parts(path.with_suffix(".svg"), _curves(ours, theirs), *_stacked(ours), axis="ms a step")
        lines += [f"![a rank's own work against the number of ranks]({name})", ""]
    ranks = sorted({number for points in ours.values() for number in points})
    if ours:
        lines += ["## All ranks", "", *pages.paragraph("Milliseconds a step.")]
        rows = [[_name(case), *_cells(points, ranks), _grown(points)] for case, points in ours.items()]
        lines += [*pages.table(["", *map(_ranks, ranks), f"{FAR:,} / {NEAR}"], rows), ""]
        lines += _left_out(ours, ranks)
        lines += ["## Where it goes", ""]
        for case in [case for case in ours if case[:2] == (TABLES, SLABS)] or list(ours)[:1]:
            lines += [*pages.paragraph(f"{_name(case)}:"), *_parts(ours[case], PARTS), ""]
        lines += ["## What a GPU would be asked for", ""]
        lines += [*pages.table(["", "operators and compiled calls", "host syncs"], map(_counts, ours.items())), ""]
    if theirs:
        lines += ["## TorchRec", "", *pages.paragraph(peer_ranks.ABOUT)]
        for case, points in theirs.items():
            lines += [*pages.paragraph(f"{_name(case)}:"), *_parts(points, peer_ranks.PARTS, _fastest(ours, case)), ""]
    lines += [f"- Left out: {each['who']} on {each['ranks']} ranks: {each['left_out']}" for each in results if "left_out" in each]
    return lines


ByRanks = dict[int, Result]


def _by_case(points: list[Result]) -> dict[tuple[Any, ...], ByRanks]:
    found: dict[tuple[Any, ...], ByRanks] = {}
    for each in points:
        found.setdefault(tuple(each[key] for key in CASE), {})[each["ranks"]] = each
    return found


def _name(case: tuple[Any, ...]) -> str:
    tables, slabs, ids, packing = case
    return Case(tables, slabs, ROWS, SAMPLES, ids, packing).name


def _ranks(number: int) -> str:
    return f"{number:,}"


def _cells(points: ByRanks, ranks: Sequence[int]) -> list[str]:
    return [f"{points[number]['milliseconds']:.2f}" if number in points else "" for number in ranks]


def _grown(points: ByRanks) -> str:
    there = NEAR in points and FAR in points
    return f"**{points[FAR]['milliseconds'] / points[NEAR]['milliseconds']:.2f}**" if there else ""


def _left_out(ours: dict[tuple[Any, ...], ByRanks], ranks: Sequence[int]) -> list[str]:
    if all(number in points for points in ours.values() for number in ranks):
        return []
    return pages.paragraph(f"Plans of more than {MOST_BLOCKS:,} shards are left out: they take a minute to build.")


def _parts(points: ByRanks, parts: Sequence[str], beside: ByRanks | None = None) -> list[str]:
    rows = []
    for number, each in points.items():
        cells = [f"{each['parts'][part]:.2f}" for part in parts]
        ours = beside.get(number) if beside else None
        ratio = [f"**{each['milliseconds'] / ours['milliseconds']:.1f}**" if ours else ""] if beside is not None else []
        rows.append([_ranks(number), *cells, f"{each['milliseconds']:.2f}", f"{each['median']:.2f}", *ratio])
    return pages.table(["ranks", *parts, "all", "median", *["times ours"] * (beside is not None)], rows)


def _fastest(ours: dict[tuple[Any, ...], ByRanks], case: tuple[Any, ...]) -> ByRanks:
    """Ours on the same ids with the packing that is slower, at each number of ranks."""
    found: ByRanks = {}
    for (tables, slabs, ids, _), points in ours.items():
        if (tables, slabs, ids) == (case[0], SLABS, case[2]):
            for number, each in points.items():
                found[number] = max(each, found.get(number, each), key=lambda one: one["milliseconds"])
    return found


def _counts(of_case: tuple[tuple[Any, ...], ByRanks]) -> list[str]:
    case, points = of_case
    return [_name(case), *(_span([each[key] for each in points.values()]) for key in ("operators", "host_syncs"))]


def _span(numbers: Sequence[int]) -> str:
    return str(min(numbers)) if min(numbers) == max(numbers) else f"{min(numbers)} to {max(numbers)}"


def _curves(ours: dict[tuple[Any, ...], ByRanks], theirs: dict[tuple[Any, ...], ByRanks]) -> list[plots.Curve]:
    shown = {case: points for case, points in ours.items() if case[:2] == (TABLES, SLABS)} or ours
    found = [_curve(_name(case), points, str(case[2:])) for case, points in shown.items()]
    return found + [_curve(f"{TORCHREC}, {case[2]} id(s)", points, f"TorchRec {case[2]}", True) for case, points in theirs.items()]


def _curve(name: str, points: ByRanks, colour: str, dashed: bool = False) -> plots.Curve:
    # Bands reach from the least to the median.
    y = [Spread(each["milliseconds"], each["milliseconds"], each["median"], each["milliseconds"]) for each in points.values()]
    return plots.Curve(name, list(points), y, colour, dashed)


def _stacked(ours: dict[tuple[Any, ...], ByRanks]) -> tuple[str, list[float], dict[str, list[float]]]:
    """The parts of one case, of the first with several ids where there is one."""
    case = next((case for case in ours if case[2] > 1), next(iter(ours)))
    points = ours[case]
    return _name(case), list(points), {part: [each["parts"][part] for each in points.values()] for part in PARTS}
