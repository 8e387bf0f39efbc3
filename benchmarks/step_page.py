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
    "Forward, backward and update (rowwise Adagrad; torch's is Adagrad) of the embedding part. On each number of ranks all "
    "contenders take turns in one job, on the same ids: a step untimed, then the timed ones, between barriers. Milliseconds are "
    "medians over rounds with their quartiles; a ratio is the median of the ratios of single rounds. Ranks that share cores "
    "measure total work, not scaling. Tables are packed as sends fewer bytes unless a name says otherwise."
)
PHASES = (
    "Phases end when the last rank ends them. The limit of a phase is the time measured in the same run for the least work that it "
    "stands for: an all-to-all of the same bytes in equal shares, a gather and sum of the same rows (with prefetching), of the "
    "update one of the distinct rows for reading and one for writing, and a copy of what combine reads and writes, each way. Route "
    "has none."
)
PEERS = ("TorchRec", "FBGEMM", "nn.Embedding", "DTensor")


def page(results: list[Result], path: Path | None) -> list[str]:
    """Ratios first, then every figure."""
    lines = ["## How many times as long as ours", ""]
    if path:
        name = plots.bars(path.with_suffix(".svg"), _bars(results), "times as long as ours (median and quartiles of rounds)")
        lines += [f"![each contender's time as a multiple of ours]({name})", ""]
    lines += pages.table(["workload", "ranks", "plan", "ours, ms", "fastest of its kind", "ms", "times ours"], _summary(results))
    lines += ["", *pages.paragraph("Below, for each: all contenders, and the phases of our step.", PHASES)[:-1]]
    for result in results:
        lines += ["", *_section(result)]
    return lines


@dataclass(frozen=True)
class Line:
    """A contender: milliseconds by round, and as multiples of ours in the same heat."""

    name: str
    ms: Spread
    beside: Spread


def _lines(result: Result) -> dict[str, Line]:
    """All contenders by name; ours with the times of all heats."""
    found = {}
    for heat in result["heats"]:
        found |= {name: Line(name, spread(times), ratio(times, heat[OURS])) for name, times in heat.items()}
    every = [time for heat in result["heats"] for time in heat[OURS]]
    return {**found, OURS: Line(OURS, spread(every), ratio(every, every))}


def _best(result: Result) -> dict[str, Line]:
    """The fastest variant of each peer, by peer: its best working setting. Narrower wires are not the same step."""
    found: dict[str, Line] = {}
    for line in _lines(result).values():
        peer = next((peer for peer in PEERS if line.name.startswith(peer)), None)
        if peer and "bfloat16" not in line.name and (peer not in found or line.beside.median < found[peer].beside.median):
            found[peer] = line
    return found


def _summary(results: list[Result]) -> list[list[str]]:
    rows = []
    for result in results:
        ours = _lines(result)[OURS]
        for line in _best(result).values():
            times = f"**{line.beside.median:.2f}** ({line.beside.low:.2f} to {line.beside.high:.2f})"
            place = [result["workload"], str(result["ranks"]), _plan(result)]
            rows.append([*place, f"{ours.ms.median:.2f}", line.name, f"{line.ms.median:.2f}", times])
    return rows


def _plan(result: Result) -> str:
    return result["kind"].replace("_", "-")


def _bars(results: list[Result]) -> dict[str, dict[str, Spread]]:
    found: dict[str, dict[str, Spread]] = {}
    for result in results:
        ranks = f", {result['ranks']} ranks" if result["ranks"] > 1 else ""
        best = {peer: line.beside for peer, line in _best(result).items()}
        if best:
            found[f"{result['workload']}, {_plan(result)}{ranks}"] = best
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
        ]
        for line in _lines(result).values()
    ]
    lines += pages.table(["contender", "median ms", "quartiles", "least", "times ours"], rows)
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
