"""The page of `shardembed bench step`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks import pages, plots
from benchmarks.contenders import OURS
from benchmarks.figures import Spread, ratio, spread
from benchmarks.jobs import Result

TITLE = "A training step beside the peers"
ABOUT = (
    "Forward, concatenation of the vectors, backward, update (rowwise Adagrad; torch's is Adagrad) and `zero_grad` of the "
    "embedding part, as a user of each library writes them, from raw tensors. Every contender has processes of its own, one a "
    "rank, and they take turns on the same ids: two steps that are not counted, since they find the caches full of others' rows, "
    "then the counted ones, each between two barriers; meanwhile the others are stopped. Milliseconds are medians over all steps "
    "with their quartiles; a ratio is the median of the ratios of single steps, on the same ids in the same round, and beside it "
    "stands the ratio of the least steps. Ours is what `row_wise()` and its siblings give without further settings, unless a name "
    "says otherwise. Ranks that share cores measure total work, not scaling."
)
PHASES = (
    "Phases end when the last rank ends them. The limit of a phase is the time measured in the same run for the least work that it "
    "stands for: an all-to-all of the same bytes in equal shares, a gather and sum of the same rows (with prefetching), of the "
    "update one of the distinct rows for reading and one for writing, and a copy of what combine reads and writes, each way. Route "
    "has none."
)


def page(results: list[Result], path: Path | None) -> list[str]:
    """Ratios first, then every figure."""
    lines = ["## How many times as long as ours", ""]
    if path:
        name = plots.bars(path.with_suffix(".svg"), _bars(results), "times as long as ours (median and quartiles of steps)")
        lines += [f"![each contender's time as a multiple of ours]({name})", ""]
    lines += pages.table(["workload", "ranks", "plan", "ours, ms", "peer", "ms", "times ours", "least / least"], _summary(results))
    lines += ["", *pages.paragraph("Below, for each: all contenders, and the phases of our step.", PHASES)[:-1]]
    for result in results:
        lines += ["", *_section(result)]
    return lines


@dataclass(frozen=True)
class Line:
    """A contender beside ours.

    Attributes:
        name: of the contender.
        ms: milliseconds of its steps.
        beside: as multiples of ours in the same heat, step by step.
        least: its least step, as a multiple of our least in the same heat.
    """

    name: str
    ms: Spread
    beside: Spread
    least: float


def _lines(result: Result) -> dict[str, Line]:
    """All contenders by name; ours with the times of all heats."""
    found = {}
    for heat in result["heats"]:
        least = spread(heat[OURS]).least
        found |= {name: Line(name, spread(ms), ratio(ms, heat[OURS]), spread(ms).least / least) for name, ms in heat.items()}
    every = [time for heat in result["heats"] for time in heat[OURS]]
    return {**found, OURS: Line(OURS, spread(every), ratio(every, every), 1.0)}


def _peers(result: Result) -> dict[str, Line]:
    """What is not ours, in the settings that make the same step: narrower wires do not."""
    return {name: line for name, line in _lines(result).items() if not name.startswith(OURS) and "bfloat16" not in name}


def _summary(results: list[Result]) -> list[list[str]]:
    rows = []
    for result in results:
        ours = _lines(result)[OURS]
        for line in _peers(result).values():
            times = f"**{line.beside.median:.2f}** ({line.beside.low:.2f} to {line.beside.high:.2f})"
            place = [result["workload"], str(result["ranks"]), _plan(result), f"{ours.ms.median:.2f}"]
            rows.append([*place, line.name, f"{line.ms.median:.2f}", times, f"{line.least:.2f}"])
    return rows


def _plan(result: Result) -> str:
    return result["kind"].replace("_", "-")


def _bars(results: list[Result]) -> dict[str, dict[str, Spread]]:
    found: dict[str, dict[str, Spread]] = {}
    for result in results:
        ranks = f", {result['ranks']} ranks" if result["ranks"] > 1 else ""
        peers = {name: line.beside for name, line in _peers(result).items()}
        if peers:
            found[f"{result['workload']}, {_plan(result)}{ranks}"] = peers
    return found


def _section(result: Result) -> list[str]:
    size = ", ".join(f"{value} {key}" if key == "tables" else f"{key} {value}" for key, value in result["size"].items())
    ranks = f", {result['ranks']} ranks" if result["ranks"] > 1 else ""
    lines = [f"## {result['workload']}{ranks}, {_plan(result)}", "", size[0].upper() + size[1:] + ".", ""]
    rows = [
        [
            line.name,
            f"{line.ms.median:.2f}",
            f"{line.ms.low:.2f} to {line.ms.high:.2f}",
            f"{line.ms.least:.2f}",
            f"{line.beside:.2f}",
            f"{line.least:.2f}",
        ]
        for line in _lines(result).values()
    ]
    lines += pages.table(["contender", "median ms", "quartiles", "least", "times ours", "least / least"], rows)
    if "phases" in result:
        lines += ["", *_phases(result)]
    if result["left_out"]:
        lines += ["", *(f"- Left out: {name}: {reason}" for name, reason in result["left_out"].items())]
    return lines


def _phases(result: Result) -> list[str]:
    machine = result["limits"]
    packed = " and ".join(f"{count} tables as {packing}" for packing, count in result["packings"].items())
    text = f"{OURS} packs {packed}. Measured here: copying {machine['copy'] / 1e9:.1f} GB/s (read and written), "
    text += f"{machine['gather'] / 1e6:.1f} million random rows of {machine['width']} floats a second"
    text += f", an empty all-to-all {1e3 * machine['empty']:.2f} ms." if machine["empty"] else "."
    rows = [
        [
            *(phase["name"], f"{phase['ms']:.2f}", f"{phase['limit_ms']:.2f}" if phase["limit_ms"] else ""),
            f"{phase['limit_ms'] / phase['ms']:.0%}" if phase["limit_ms"] else "",
            *(f"{phase['sent'] / 1e6:.3f}" if phase["sent"] else "", f"{phase['calls']:g}" if phase["calls"] else ""),
        ]
        for phase in result["phases"]
    ]
    known = [phase for phase in result["phases"] if phase["limit_ms"]]
    limit, taken = (sum(phase[key] for phase in known) for key in ("limit_ms", "ms"))
    whole = sum(phase["ms"] for phase in result["phases"])
    sent, calls = (sum(phase[key] for phase in result["phases"]) for key in ("sent", "calls"))
    share = f"{limit / whole:.0%}" if taken else ""
    rows.append(["all", f"{whole:.2f}", f"{limit:.2f}", share, f"{sent / 1e6:.3f}" if sent else "", f"{calls:g}" if calls else ""])
    head = ["phase", "ms", "limit, ms", "limit / time", "MB sent, all ranks", "collectives"]
    return [*pages.paragraph(text), *pages.table(head, rows)]
