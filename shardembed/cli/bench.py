"""`shardembed bench`: measure this machine, beside the peers that are installed, and write the figures down. What measures lies in
`benchmarks/`, beside the package.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.cli import launch
from shardembed.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.options import Options

SETS = {  # name -> (module, what it measures, numbers of ranks)
    "step": ("step", "a training step beside every peer, and where its time goes", (1, 2)),
    "bytes": ("wire_bytes", "bytes of a step through the loopback interface", (2, 4)),
    "growth": ("growth", "how a step grows with tables, samples, ids and ranks", (1, 2, 3, 4)),
    "startup": ("startup", "import, plan, build and first step", (2,)),
    "dynamic": ("dynamic", "a step of a dynamic table beside a dense one and TorchRec's managed collisions", (1, 2)),
    "ranks": ("ranks", "a rank's own work a step on many simulated ranks", (2, 8, 64, 256, 1024, 4096)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    listed = "; ".join(f"{name}: {purpose}" for name, (_, purpose, _) in SETS.items())
    parser.add_argument("set", nargs="?", choices=SETS, default="step", metavar="SET", help=f"{listed} (default: step)")
    parser.add_argument("--workload", nargs="+", default=[], metavar="NAME", help="pooled, sequences, overhead, or a workload file")
    parser.add_argument(
        "--ranks", type=int, nargs="+", metavar="N", help="numbers of ranks, one after the other (ranks: simulated)"
    )
    parser.add_argument("--kind", nargs="+", default=[], help="row_wise, table_wise, column_wise, mixed, auto (default: all)")
    parser.add_argument("--full", action="store_true", help="every contender, packing, wire and optimizer")
    parser.add_argument("--only", default="", metavar="REGEX", help="contenders whose names match")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="rounds of turns (default 10)")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="counted steps of a turn (default 3)")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="of one rank's batch (default: the workload's own; of a file 1024)"
    )
    parser.add_argument("--max-rows", type=int, default=400_000, metavar="N", help="of a table from a file (default 400000)")
    parser.add_argument("--plain-malloc", action="store_true", help="ours leaves glibc's way of freeing memory alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="write the page here, and its plots beside it")


def run(arguments: argparse.Namespace) -> int:
    """Measure; returns the exit code."""
    _find_benchmarks()
    from benchmarks import crew, jobs, report

    module, _, ranks = SETS[arguments.set]
    bench = importlib.import_module(f"benchmarks.{module}")
    options = _options(arguments, ranks)
    if launch.in_job():
        raise ConfigError("bench starts ranks of its own; run it outside of torchrun")
    for path in (arguments.json, arguments.markdown):
        if path and not path.absolute().parent.is_dir():  # before minutes are spent
            raise ConfigError(f"{path}: there is no folder {path.absolute().parent}")
    words = _words(arguments, options)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # ranks share the cores; torchrun sets the same default
    try:
        results = bench.collect(options, words)
    except jobs.BenchFailedError as error:
        return error.code
    except crew.CrewError as error:
        jobs.say("\n".join(error.args))
        return 1
    if arguments.json:
        figures = bench.as_json(results) if hasattr(bench, "as_json") else {"results": results}
        arguments.json.write_text(json.dumps({**report.circumstances(words), **figures}, indent=1))
    print(report.write(bench, results, words, options, arguments.markdown))
    return 0


def _find_benchmarks() -> None:
    """Make the benchmarks importable: they lie beside the package in a clone, and in no wheel.

    Raises:
        ConfigError: there is no clone.
    """
    clone = Path(__file__).parents[2]
    if not (clone / "benchmarks" / "roster.py").is_file():
        raise ConfigError(
            f"the benchmarks are no part of the installed package ({clone}): run `make bench` or `shardembed bench` from a clone "
            "of the repository. To measure a machine for the planner, `shardembed calibrate` is all that is needed"
        )
    if str(clone) not in sys.path:
        sys.path.insert(0, str(clone))


def _options(arguments: argparse.Namespace, ranks: tuple[int, ...]) -> Options:
    from benchmarks.contenders import KINDS
    from benchmarks.options import Options

    for name in ("rounds", "steps", "samples", "max_rows"):
        given = getattr(arguments, name)
        if given is not None and given < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {given}: must be at least 1")
    if any(number < 1 for number in arguments.ranks or ()):
        raise ConfigError(f"--ranks {' '.join(map(str, arguments.ranks))}: each must be at least 1")
    for kind in arguments.kind:
        if kind not in KINDS:
            raise ConfigError(f"--kind {kind}: is none of {', '.join(KINDS)}")
    return Options(
        ranks=tuple(arguments.ranks or ranks),
        workloads=tuple(arguments.workload),
        kinds=tuple(arguments.kind),
        rounds=arguments.rounds,
        steps=arguments.steps,
        full=arguments.full,
        max_rows=arguments.max_rows,
        samples=arguments.samples,
        keep_memory=not arguments.plain_malloc,
        only=arguments.only,
    )


def _words(arguments: argparse.Namespace, options: Options) -> list[str]:
    """The command again, but for where results go and for its ranks."""
    words = ["bench", arguments.set, f"--rounds={options.rounds}", f"--steps={options.steps}", f"--max-rows={options.max_rows}"]
    words += [f"--samples={options.samples}"] * (options.samples is not None)
    words += [f"--only={options.only}"] * bool(options.only)
    words += ["--full"] * options.full + ["--plain-malloc"] * (not options.keep_memory)
    words += ["--workload", *options.workloads] if options.workloads else []
    return words + (["--kind", *options.kinds] if options.kinds else [])
