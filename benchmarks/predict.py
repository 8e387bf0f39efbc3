"""Is the planner's step time true? Plans drawn from the whole space, predicted after `calibrate` and then timed.

    python -m benchmarks.predict [--ranks 2] [--plans 13] [--seconds 200] [--markdown docs/benchmarks/PAGE.md]

The cases of `calibrate` and the plans of a workload take turns: how fast a shared machine is changes from minute to minute, and
what is asked here is how true the model is. `--topology FILE` takes an earlier calibration instead.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

import shardembed as se
from benchmarks.unseen import WORKLOADS, Trial, trials
from shardembed.comm.job import ranks_per_node
from shardembed.kernels.memory import keep_freed_memory
from shardembed.planner import calibrate
from shardembed.planner import topology as topologies
from shardembed.planner.calibrate import drawn, processor
from shardembed.planner.calibrate.stages import Runner, in_turns
from shardembed.planner.cost import estimate
from shardembed.planner.cost_phases import PHASES
from shardembed.tables.placement import Cluster
from shardembed.tables.plan import Plan, TablePlan


@dataclass(frozen=True)
class Line:
    """One plan: seconds of a step as predicted, and the quartiles of those measured; phases of both."""

    workload: str
    plan: str
    predicted: float
    low: float
    median: float
    high: float
    predicted_phases: list[float]
    phases: list[float]


def rank_main(topology: Path | None, plans: int, seconds: float, out: Path) -> None:
    """What each rank runs; rank 0 writes the lines, and what the topology says of its origin."""
    torch.set_num_threads(1)
    keep_freed_memory()
    comm = se.init()
    cluster = Cluster(comm.world_size, ranks_per_node(comm.world_size))
    cases = [] if topology else drawn.cases(cluster, calibrate.CASES, calibrate.SEED)
    known = topologies.load(topology, comm.world_size) if topology else None
    lines: list[Line] = []
    source: dict[str, str] = {}
    groups = [list(group) for _, group in groupby(trials(cluster, plans), lambda trial: trial.case.workload.name)]
    for chosen in groups:  # a workload after the other: all plans at once take more memory than there may be
        runners = [Runner(case, calibrate.BATCHES, calibrate.SEED) for case in cases]
        runners += [Runner(trial.case, batches=3, seed=SEED) for trial in chosen]
        timed = in_turns(runners, seconds / len(groups))
        del runners
        machine = known or calibrate.fitted("here", cluster, cases, timed[: len(cases)])[0]
        lines += [_line(trial, machine, phases) for trial, phases in zip(chosen, timed[len(cases) :], strict=True)]
        source = machine.source
    if comm.rank == 0:
        out.write_text(json.dumps({"lines": [line.__dict__ for line in lines], "source": source}))


SEED = 7  # of the batches


def _line(trial: Trial, topology: topologies.Topology, phases: np.ndarray) -> Line:
    said = estimate(trial.case.plan, trial.told, topology)
    low, median, high = (float(number) for number in np.quantile(phases.sum(1), [0.25, 0.5, 0.75]))
    middle = np.median(phases, 0).tolist()
    name = trial.case.workload.name
    return Line(name, describe(trial.case.plan), said.step_seconds, low, median, high, said.phase_seconds.tolist(), middle)


def describe(plan: Plan) -> str:
    """How many tables are cut how: "3 row_wise bag, 1 replicated"."""

    def said(table: TablePlan) -> str:
        strips = len(table.layout.strips)
        return table.kind if table.layout.copied else f"{table.kind}{f' x {strips}' if strips > 1 else ''} {table.packing}"

    return ", ".join(f"{count} {kind}" for kind, count in Counter(said(table) for table in plan.tables).most_common())


def figures(lines: list[Line]) -> dict[str, float]:
    """Errors are relative to the measured median. spread: half the distance of the quartiles, likewise."""
    said, seen = np.array([line.predicted for line in lines]), np.array([line.median for line in lines])
    off = said / seen - 1.0
    return {
        "plans": len(lines),
        "error": float(np.abs(off).mean()),
        "bias": float(off.mean()),
        "worst": float(np.abs(off).max()),
        "rank_correlation": _rank_correlation(said, seen),
        "spread": float(np.mean([(line.high - line.low) / 2 / line.median for line in lines])),
        "least_ms": float(1e3 * seen.min()),
        "most_ms": float(1e3 * seen.max()),
    }


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's."""
    ranks = [rankdata(values) for values in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def _priority() -> str:
    first = os.sched_getscheduler(0) in (os.SCHED_RR, os.SCHED_FIFO)
    return ",\nbefore whatever else this shared machine did (`chrt -r 1`)" if first else ""


def page(lines: list[Line], command: str, picture: str | None, measured: dict[str, str]) -> str:
    """The Markdown page."""
    total = figures(lines)
    text = [
        f"# Predicted and measured step times, {datetime.date.today()}",
        "",
        f"`{command}`",
        "",
        f"{os.cpu_count()} cores ({processor()}), torch {torch.__version__}, Gloo on loopback, 2 ranks of one thread. The cases of",
        "`shardembed calibrate`, workloads of its own, took turns with plans drawn by a fixed seed from the whole space (every",
        "kind, cut, packing and uneven bounds, mixed by table) on workloads that it had not seen. The model was fitted to the",
        f"former and predicted the latter. A step is forward, backward and update of the embedding part{_priority()}.",
        "",
        f"Calibration: {measured.get('measured', '?')}.",
        "",
        f"**{total['plans']:.0f} plans: mean absolute error {total['error']:.1%}, rank correlation "
        f"{total['rank_correlation']:.3f}.** With its sign, the mean error is {total['bias']:+.1%}; the largest is",
        f"{total['worst']:.0%}. The measured times themselves scatter: half of the steps of a plan lie within",
        f"{total['spread']:.0%} of its median.",
        "",
        "How fast this virtual machine is changes from minute to minute: with calibration and timing one after the other, three",
        "runs of this day were 11.6 to 14.1 % off, nearly all of it in one direction, which was another from run to run.",
        "",
        *([f"![predicted against measured step times]({picture})", ""] if picture else []),
        "| workload | plans | measured ms | mean error | with sign | rank correlation | quartiles |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in WORKLOADS:
        found = figures([line for line in lines if line.workload == name])
        text.append(
            f"| {name} | {found['plans']:.0f} | {found['least_ms']:.1f} to {found['most_ms']:.1f} | {found['error']:.1%} "
            f"| {found['bias']:+.1%} | {found['rank_correlation']:.3f} | +-{found['spread']:.0%} |"
        )
    text += ["", "| phase | share of the step | error of the sum over all plans |", "|---|---|---|"]
    said, seen = (np.sum([getattr(line, name) for line in lines], 0) for name in ("predicted_phases", "phases"))
    for phase, one, other in zip(PHASES, said, seen, strict=True):
        text.append(f"| {phase} | {other / seen.sum():.0%} | {one / other - 1:+.0%} |")
    text += ["", "| workload | plan | predicted ms | measured ms | quartiles |", "|---|---|---|---|---|"]
    for line in lines:
        measured_ms = f"{1e3 * line.median:.1f} | {1e3 * line.low:.1f} to {1e3 * line.high:.1f}"
        text.append(f"| {line.workload} | {line.plan} | {1e3 * line.predicted:.1f} | {measured_ms} |")
    return "\n".join(text) + "\n"


def plot(lines: list[Line], path: Path) -> None:
    """The scatter plot."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "shardembed"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 7))
    for name in WORKLOADS:
        mine = [line for line in lines if line.workload == name]
        x = 1e3 * np.array([line.predicted for line in mine])
        low, y, high = (1e3 * np.array([getattr(line, field) for line in mine]) for field in ("low", "median", "high"))
        axes.errorbar(x, y, [y - low, high - y], fmt="o", markersize=4, linewidth=1, label=name)
    ends = 1e3 * np.array([min(line.predicted for line in lines) * 0.8, max(line.high for line in lines) * 1.2])
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.fill_between(ends, ends / 1.15, ends * 1.15, color="black", alpha=0.08, label="within 15 %")
    axes.set(xscale="log", yscale="log", xlabel="predicted ms a step", ylabel="measured ms a step (median, quartiles)")
    axes.set_aspect("equal")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--plans", type=int, default=13, help=f"for each of the {len(WORKLOADS)} workloads")
    parser.add_argument("--seconds", type=float, default=200.0, help="of timing")
    parser.add_argument("--topology", type=Path, help="an earlier calibration")
    parser.add_argument("--markdown", type=Path, help="also write the page here, and the plot beside it")
    parser.add_argument("--lines", type=Path, help="also write all figures here, as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        rank_main(args.topology, args.plans, args.seconds, args.child)
        return 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
        child = ["-m", "benchmarks.predict", "--plans", str(args.plans), "--seconds", str(args.seconds)]
        child += [*(["--topology", str(args.topology)] if args.topology else []), "--child", str(out)]
        subprocess.run([*launch, *child], check=True, env=environment)
        found = json.loads(out.read_text())
        lines, measured = [Line(**line) for line in found["lines"]], found["source"]
    if args.lines:
        args.lines.write_text(json.dumps([line.__dict__ for line in lines]))
    picture = args.markdown.with_suffix(".svg") if args.markdown else None
    text = page(lines, "python -m benchmarks.predict " + " ".join(sys.argv[1:]), picture and picture.name, measured)
    print(text)
    if picture:
        args.markdown.write_text(text)
        plot(lines, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
