"""`shardembed plan WORKLOAD --topology T`: cut the tables of a model over a cluster, without either of them at hand."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardembed import optim
from shardembed.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from shardembed.planner.constraints import Constraints
    from shardembed.planner.highs import Effort
    from shardembed.planner.result import Estimate, Planned
    from shardembed.planner.sweep import Sweep
    from shardembed.planner.topology import Topology
    from shardembed.planner.why import Alternative
    from shardembed.planner.workload import Workload
    from shardembed.tables.plan import Plan

AROUND = (-2, 2)  # the page's own sweep: powers of two below and above the plan's rank count
GIB = 1 << 30
Progress = Callable[[str, float | None, float | None], None]
MOST = 1e18  # of a number that is given: more is a slip
EXIT_INTERRUPTED = 130  # as a shell has it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workload",
        nargs="?",
        metavar="WORKLOAD",
        help="workload file or the name of one that comes along, such as dlrm-dcnv2; training configuration; or module:function "
        "that returns a model with tables",
    )
    machine = parser.add_argument_group("the cluster")
    machine.add_argument(
        "--topology", metavar="T", help="built-in name such as h100x8, or a file that `shardembed calibrate` wrote"
    )
    machine.add_argument("--ranks", type=int, metavar="N", help="as many ranks of the topology's machines")
    machine.add_argument("--memory", type=float, metavar="GIB", help="memory of a rank, instead of the topology's")
    model = parser.add_argument_group("the model")
    model.add_argument("--batch", type=int, metavar="N", help="samples a step, all ranks together")
    model.add_argument(
        "--ids",
        action="append",
        default=[],
        metavar="[FEATURE=]N",
        help="ids of a sample, where the model does not say (module:function); may be repeated",
    )
    model.add_argument("--optimizer", metavar="NAME", help=f"of all tables: {', '.join(optim.NAMES)}")
    rest = parser.add_argument_group(
        "the rest of the job, for what is predicted of a whole step and an epoch; no plan depends on it"
    )
    rest.add_argument(
        "--dense-ms",
        type=float,
        metavar="MS",
        help="what the dense part takes one rank for its samples of a step on --ranks ranks (else the topology's)",
    )
    rest.add_argument("--dense-parameters", type=int, metavar="N", help="how many numbers the dense part learns")
    rest.add_argument("--samples", type=int, metavar="N", help="samples of an epoch")
    rest.add_argument("--cost-per-hour", type=float, metavar="X", help="of one rank, in any currency; needs --samples")
    wishes = parser.add_argument_group("what the plan must keep to; both may be repeated")
    wishes.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="TABLE=WISH",
        help="such as user=row_wise, user=table_wise:3 or user=packing:bag",
    )
    wishes.add_argument(
        "--forbid", action="append", default=[], metavar="[TABLE=]KIND", help="such as column_wise or user=replicated"
    )
    search = parser.add_argument_group("the search")
    search.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same plan (default 0)")
    search.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help="stop the search after so long, with the best so far (default: when it has done its work)",
    )
    output = parser.add_argument_group("what comes out")
    output.add_argument("--out", type=Path, metavar="FILE", help="save the plan as JSON, for plan=se.Plan.load(FILE)")
    output.add_argument("--report", type=Path, metavar="FILE", help="write a page with plots, self-contained HTML")
    output.add_argument("--explain", metavar="TABLE", help="say why a table lies as it does")
    output.add_argument("--sweep", metavar="RANKS", help="plan for several rank counts: ranks=8..4096 or ranks=8,24,64")
    output.add_argument("--plot", type=Path, metavar="FILE", help="of a sweep: draw it (PNG, SVG or PDF)")
    output.add_argument("--diff", nargs=2, type=Path, metavar=("OLD", "NEW"), help="compare two saved plans, and plan nothing")
    output.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Plan, sweep or compare; returns the exit code."""
    from shardembed.config.console import console_for
    from shardembed.planner.result import INTERRUPTED

    console = console_for(sys.stderr if arguments.json else sys.stdout)
    _check(arguments)
    try:
        found = _answer(arguments, console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped before there was a plan to show; nothing was written") from None
    if arguments.json:
        print(json.dumps(found), flush=True)
    return EXIT_INTERRUPTED if found.get("stopped") == INTERRUPTED else 0


def _answer(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    if arguments.diff is not None:
        return _diff(arguments, console)
    return _plan(arguments, console) if arguments.sweep is None else _sweep(arguments, console)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.diff is None and arguments.workload is None:
        raise ConfigError("say what to plan: a workload file, a training configuration or module:function (or --diff OLD NEW)")
    if arguments.diff is None and arguments.topology is None:
        from shardembed.planner import builtin

        known = ", ".join(builtin.files("topologies"))
        raise ConfigError(f"--topology is missing: one of {known}, or a file that `shardembed calibrate` wrote")
    modes = [name for name in ("diff", "sweep", "explain") if getattr(arguments, name) is not None]
    if len(modes) > 1:
        raise ConfigError(f"--{modes[0]} and --{modes[1]} are different questions; ask one at a time")
    if arguments.plot is not None and arguments.sweep is None:
        raise ConfigError("--plot draws a sweep; add --sweep ranks=8..4096, or write a page with --report")
    for name in ("ranks", "batch", "memory", "seconds", "dense_ms", "dense_parameters", "samples", "cost_per_hour"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < MOST:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be above 0{'' if value <= 0 else ' and below 1e18'}")
    if arguments.seed < 0:
        raise ConfigError(f"--seed {arguments.seed}: must not be negative")
    for name in ("out", "report", "plot"):
        path = getattr(arguments, name)
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"--{name} {path}: there is no folder {path.parent}")


@dataclass(frozen=True)
class Question:
    """What is to be planned, read from the arguments.

    Attributes:
        workload: the model's tables and what its batches ask of them.
        topology: the machines.
        constraints: what the user demands of the plan.
        arguments: all of them, as argparse has them.
        effort: how hard to look.
    """

    workload: Workload
    topology: Topology
    constraints: Constraints
    arguments: argparse.Namespace
    effort: Effort

    @staticmethod
    def of(arguments: argparse.Namespace, effort: Effort) -> Question:
        from shardembed.planner import topology
        from shardembed.planner.constraints import Constraints

        machines = topology.load(arguments.topology)
        if arguments.ranks is not None:
            machines = machines.scaled(arguments.ranks)
        if arguments.memory is not None:
            machines = _with_memory(machines, arguments.memory)
        workload = _with_rest(arguments, _workload(arguments, machines.ranks), machines.ranks)
        if arguments.cost_per_hour is not None and workload.samples is None:
            raise ConfigError("--cost-per-hour: what an epoch costs takes its samples too; add --samples N")
        wishes = Constraints.parse(arguments.pin, arguments.forbid)
        return Question(workload, machines, wishes, arguments, effort)

    def plan(self, ranks: int, progress: Progress) -> Planned:
        from shardembed import planner

        workload, topology = self.workload, self.topology
        if ranks != topology.ranks:
            topology = topology.scaled(ranks)
            if not _is_function(self.arguments.workload):  # what a training job asks for depends on its ranks
                workload = replace(_workload(self.arguments, ranks), dense=workload.dense, samples=workload.samples)
        seed, seconds = self.arguments.seed, self.arguments.seconds
        return planner.plan(workload, topology, self.constraints, seed=seed, effort=self.effort, seconds=seconds, progress=progress)


def _with_memory(topology: Topology, gib: float) -> Topology:
    memory = round(gib * GIB)
    kept = topology.memory - topology.room
    if memory <= kept:
        raise ConfigError(
            f"--memory {gib:g}: {topology.name} keeps {kept / GIB:.1f} GiB of a rank for what is no table, so nothing is left for "
            "tables; give more"
        )
    return replace(topology, memory=memory)


def _with_rest(arguments: argparse.Namespace, workload: Workload, ranks: int) -> Workload:
    """With what the arguments say of the dense part and of an epoch, which goes before what the workload says."""
    from shardembed.planner.dense import Dense

    dense, ms, parameters = workload.dense or Dense(), arguments.dense_ms, arguments.dense_parameters
    if ms is not None:
        dense = replace(dense, seconds_per_sample=1e-3 * ms * ranks / workload.global_batch_size)
    if parameters is not None:
        dense = replace(dense, parameters=parameters)
    told = workload.dense is not None or ms is not None or parameters is not None
    return replace(workload, dense=dense if told else None, samples=arguments.samples or workload.samples)


def _workload(arguments: argparse.Namespace, ranks: int) -> Workload:
    from shardembed.cli import model_workload
    from shardembed.config.hints import nearest

    name = arguments.optimizer
    if name is not None and name not in optim.NAMES:
        raise ConfigError(f"--optimizer {name} is not one of {', '.join(optim.NAMES)}{nearest(name, optim.NAMES)}")
    ids = _ids(arguments.ids)
    if ids is not None and not _is_function(arguments.workload):
        raise ConfigError(f"--ids: {arguments.workload} says itself how many ids a sample has; change it there, as ids_per_sample")
    found = model_workload.read(arguments.workload, ranks, global_batch_size=arguments.batch, ids_per_sample=ids)
    if name is None:
        return found
    chosen = optim.NAMES[name]()
    return replace(found, tables=tuple(replace(load, optimizer=chosen) for load in found.tables))


def _is_function(workload: str) -> bool:
    return ":" in workload and not Path(workload).exists()


def _ids(texts: list[str]) -> float | dict[str, float] | None:
    """Of `--ids 20`, or `--ids history=50 --ids item=1`."""
    found: dict[str, float] = {}
    for text in texts:
        feature, equals, number = text.rpartition("=")
        try:
            found[feature] = float(number)
        except ValueError:
            found[feature] = -1.0
        if not 0 <= found[feature] < float("inf") or (equals and not feature):
            raise ConfigError(f"--ids {text}: write --ids FEATURE=NUMBER, or one number for all features")
    if "" in found and len(found) > 1:
        raise ConfigError("--ids: give one number for all features, or FEATURE=NUMBER for some; not both")
    return found.get("", found or None)


def _plan(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from shardembed.planner import report, why
    from shardembed.planner.highs import PLAN

    question = Question.of(arguments, PLAN)
    if arguments.explain is not None:
        why.number_of(question.workload, arguments.explain)
    with _progress() as progress:
        planned = question.plan(question.topology.ranks, progress)
        if arguments.report is not None:
            _write_page(arguments, question, planned, progress)
        others = _others(question, planned, progress) if arguments.explain is not None else []
    if arguments.out is not None:
        _writing(arguments.out, lambda: planned.plan.save(arguments.out))
    found = report.as_json(planned, arguments.cost_per_hour)
    if arguments.explain is not None:
        given = arguments.explain in question.constraints.tables
        found["explained"] = why.explain(console, planned, arguments.explain, others, given)
    elif not arguments.json:
        report.show(console, planned, arguments.cost_per_hour)
    for path in (arguments.out, arguments.report):
        if path is not None:
            console.print(f"wrote {path}", soft_wrap=True)
    return found


def _others(question: Question, planned: Planned, progress: Progress) -> list[Alternative]:
    from shardembed.planner import why
    from shardembed.planner.cost import estimate
    from shardembed.planner.cost_model import CostModel

    name = question.arguments.explain
    model = CostModel(question.workload, question.topology)  # once: much of an estimate is the traffic of all tables

    def count(plan: Plan) -> Estimate:
        progress(f"weighing other layouts of {name}", None, None)
        return estimate(plan, question.workload, question.topology, model)

    return why.alternatives(planned, why.number_of(question.workload, name), count)


def _write_page(arguments: argparse.Namespace, question: Question, planned: Planned, progress: Progress) -> None:
    from shardembed.planner import page
    from shardembed.planner.highs import BRIEF

    ranks = question.topology.ranks
    others = sorted({max(1, int(ranks * 2.0**power)) for power in range(AROUND[0], AROUND[1] + 1)})
    brief = replace(question, effort=BRIEF)

    def plan(count: int) -> Planned:
        return planned if count == ranks else brief.plan(count, _prefixed(progress, f"{count:,} ranks: "))

    swept = _swept(question, tuple(others), plan)
    progress("drawing the page", None, None)
    text = page.render(planned, swept, shlex.join(["shardembed", *sys.argv[1:]]), question.arguments.cost_per_hour)
    _writing(arguments.report, lambda: arguments.report.write_text(text, encoding="utf-8"))


def _sweep(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from shardembed.planner import charts, sweep
    from shardembed.planner.highs import BRIEF

    counts = sweep.parse(arguments.sweep)
    if arguments.ranks is not None:
        raise ConfigError(f"--ranks {arguments.ranks}: --sweep says which rank counts to plan for; leave --ranks out")
    for name in ("out", "report"):
        if getattr(arguments, name) is not None:
            raise ConfigError(f"--{name} is for one plan; leave --sweep out, or draw the sweep with --plot")
    question = Question.of(arguments, BRIEF)
    with _progress() as progress:
        swept = _swept(question, counts, lambda count: question.plan(count, _prefixed(progress, f"{count:,} ranks: ")))
    if not arguments.json:
        sweep.show(console, swept)
    if arguments.plot is not None:
        charts.save(charts.scaling(swept), arguments.plot)
        console.print(f"wrote {arguments.plot}", soft_wrap=True)
    return sweep.as_json(swept)


def _swept(question: Question, counts: tuple[int, ...], plan: Callable[[int], Planned]) -> Sweep:
    from shardembed.planner import sweep

    points = sweep.run(counts, plan, question.arguments.cost_per_hour)
    return sweep.Sweep(question.workload.name, question.topology.name, question.workload.global_batch_size, points)


def _diff(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    from shardembed.planner import diff
    from shardembed.tables.plan import Plan

    old, new = (_loaded(path, Plan.load) for path in arguments.diff)
    tables = _workload(arguments, new.world_size).tables if arguments.workload is not None else ()
    found = diff.compare(old, new, {load.table.name: load.table.dtype.itemsize * load.table.bucket_rows for load in tables})
    if not arguments.json:
        diff.show(console, found, (str(arguments.diff[0]), str(arguments.diff[1])))
        if not tables:
            console.print("Bytes are of float32 elements; name the WORKLOAD too where tables hold others.", style="dim")
    return diff.as_json(found)


def _loaded(path: Path, load: Callable[[Path], Any]) -> Any:
    try:
        return load(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the file: {error.strerror or error}") from error


def _writing(path: Path, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise ConfigError(f"{path}: cannot write the file: {error.strerror or error}") from error


@contextmanager
def _progress() -> Iterator[Progress]:
    """A line that changes while the planner works; nothing where stderr is no terminal."""
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    from shardembed.config.console import CleanConsole
    from shardembed.planner import words
    from shardembed.planner.result import gap_of

    console = CleanConsole(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("planning", total=None)

        def progress(doing: str, step: float | None, bound: float | None) -> None:
            said = "" if step is None else f": {words.duration(step)} a step, at least {words.bound(bound)}"
            above = None if step is None else gap_of(step, bound)
            said += "" if above is None else f", {words.percent(above)} apart"
            bar.update(task, description=f"{doing}{said}")

        yield progress


def _prefixed(progress: Progress, prefix: str) -> Progress:
    return lambda doing, step, bound: progress(prefix + doing, step, bound)
