"""How the time of a step grows: with the number of tables, samples, ids a bag, and ranks, one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks import pages, plots, rounds, tasks
from benchmarks.figures import Spread, spread
from benchmarks.jobs import Result, say
from benchmarks.options import Options
from benchmarks.roster import ONE_RANK, roster_of
from benchmarks.tasks import Task

TITLE = "How a step grows"
ABOUT = (
    "Forward, backward and update (rowwise Adagrad) of the embedding part, one quantity varied at a time; tables cut by rows, ids "
    "by Zipf's law with exponent 1.2. At each point the contenders take turns in one job. Ranks that share cores measure total "
    "work, not scaling. In the plots dashed lines are of one rank, and those of tables, samples and ids otherwise of 2."
)
TABLES, SAMPLES, IDS = (8, 50, 100, 200, 300, 400, 800), (64, 256, 1024, 4096), (1, 3, 10, 30, 100)
SHORT_TABLES, SHORT_SAMPLES, SHORT_IDS = (8, 100, 200, 300, 800), (64, 1024), (1, 10, 100)
QUANTITIES = {"tables": "tables (4 samples, 1 id each)", "samples": "samples a rank (8 tables, 10 ids)", "ids": "ids a bag"}
NEAR = (100, 300)  # numbers of tables between which the slope at 200 is taken
VARIED_ON = 2  # ranks on which tables, samples and ids are varied


def collect(options: Options, words: Sequence[str]) -> list[Result]:
    """All quantities on `VARIED_ON` ranks and on one; elsewhere the middle point alone, for the growth with ranks."""
    del words
    found = []
    for ranks in options.ranks:
        for quantity, points in series(options.full, everything=ranks in (1, VARIED_ON)).items():
            for value, task in points.items():
                say(f"{ranks} rank(s): {quantity} {value}")
                found.append({"quantity": quantity, "value": value, "ranks": ranks, **_times(task, ranks, options)})
    return found


def series(full: bool, everything: bool) -> dict[str, dict[int, Task]]:
    """Tasks by quantity and its value."""
    middle = {"ranks": {0: grown()}}
    if not everything:
        return middle
    tables, samples, ids = (TABLES, SAMPLES, IDS) if full else (SHORT_TABLES, SHORT_SAMPLES, SHORT_IDS)
    return {
        "tables": {number: tasks.alike(f"{number} tables", number, 1000, 16, 4, 1) for number in tables},
        "samples": {number: grown(samples=number) for number in samples},
        "ids": {number: grown(ids=number) for number in ids},
        **middle,
    }


def grown(samples: int = 1024, ids: int = 10) -> Task:
    """The point that samples and ids are varied around."""
    return tasks.alike("grown", 8, 200_000, 64, samples, ids)


def _times(task: Task, ranks: int, options: Options) -> Result:
    """Ours by default beside the peer of this number of ranks."""
    peer = "TorchRec" if ranks > 1 else "FBGEMM TBE"
    wants = lambda name: name == peer and options.wants(name)  # noqa: E731
    roster = roster_of(task, "row_wise" if ranks > 1 else ONE_RANK, ranks, wants=wants, keep_memory=options.keep_memory)
    times: dict[str, list[float | None]] = {}
    turns = options.rounds * (4 if task.samples <= 64 else 1)
    for heat in roster.heats():
        times |= rounds.take_turns(heat, turns, options.steps)
    return {"times": times, "left_out": roster.left_out}


# The page.


def slope(values: Sequence[float], ms: Sequence[float], near: tuple[int, int] = NEAR) -> float | None:
    """Milliseconds that one more costs, by least squares over the values between `near`; None with fewer than two."""
    chosen = [(value, time) for value, time in zip(values, ms, strict=True) if near[0] <= value <= near[1]]
    if len(chosen) < 2:
        return None
    x, y = np.array(chosen).T
    return float(np.polyfit(x, y, 1)[0])


def page(results: list[Result], path: Path | None) -> list[str]:
    lines: list[str] = []
    if path:
        name = plots.curves(path.with_suffix(".svg"), _panels(results), "ms a step")
        lines += [f"![time of a step]({name})", ""]
    lines += _overhead(results)
    head = ["quantity", "value", "ranks", "contender", "median ms", "quartiles"]
    rows = []
    for result in results:
        for contender, times in result["times"].items():
            found = spread(times)
            value = "" if result["quantity"] == "ranks" else str(result["value"])
            quartiles = f"{found.low:.2f} to {found.high:.2f}"
            rows.append([result["quantity"], value, str(result["ranks"]), contender, f"{found.median:.2f}", quartiles])
    lines += pages.table(head, rows)
    left_out = {name: reason for result in results for name, reason in result["left_out"].items()}
    return [*lines, *(f"- Left out: {name}: {reason}" for name, reason in left_out.items())]


def _overhead(results: list[Result]) -> list[str]:
    """What one more table costs."""
    found = []
    for ranks in sorted({result["ranks"] for result in results}):
        points = [result for result in results if result["quantity"] == "tables" and result["ranks"] == ranks]
        names = dict.fromkeys(name for result in points for name in result["times"])
        for name in names:
            x = [result["value"] for result in points if name in result["times"]]
            y = [spread(result["times"][name]).median for result in points if name in result["times"]]
            more = slope(x, y)
            if more is not None:
                found.append(f"{name} on {ranks} rank(s) {1e3 * more:.1f} us")
    return pages.paragraph(f"**One more table, near 200 tables:** {'; '.join(found)}.") if found else []


def _panels(results: list[Result]) -> Mapping[str, list[plots.Curve]]:
    panels: dict[str, list[plots.Curve]] = {}
    for quantity, title in QUANTITIES.items():
        for ranks in sorted({result["ranks"] for result in results if result["quantity"] == quantity}):
            points = [result for result in results if result["quantity"] == quantity and result["ranks"] == ranks]
            for name in dict.fromkeys(name for result in points for name in result["times"]):
                line = {result["value"]: spread(result["times"][name]) for result in points if name in result["times"]}
                panels.setdefault(title, []).append(_curve(name, ranks, line))
    grown_with_ranks: dict[str, dict[float, Spread]] = {}
    for result in results:
        for name, times in result["times"].items() if result["quantity"] == "ranks" else ():
            grown_with_ranks.setdefault(name, {})[result["ranks"]] = spread(times)
    panels["ranks (8 tables, 1,024 samples, 10 ids)"] = [_curve(name, 2, line) for name, line in grown_with_ranks.items()]
    return panels


def _curve(name: str, ranks: int, line: Mapping[float, Spread]) -> plots.Curve:
    alone = ranks == 1
    return plots.Curve(f"{name}, one rank" if alone else name, list(line), list(line.values()), name, dashed=alone)
