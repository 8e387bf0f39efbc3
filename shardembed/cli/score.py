"""`shardembed score RUN --data FILE --out FILE`: scores of rows without labels, from a run of `train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardembed.cli import launch
from shardembed.cli.given import run_in

if TYPE_CHECKING:
    from shardembed.recipes.use.score import Scored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run of `shardembed train`")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="FILE", help="files, as data.path of the run takes them, without labels"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write: .parquet, .csv, .tsv or .jsonl")
    parser.add_argument("--columns", default="", metavar="A,B", help="columns of the data to be carried along beside the score")
    parser.add_argument(
        "--on-bad-row", choices=("raise", "skip"), default="raise", help="what becomes of rows that cannot be read (default: raise)"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine, which share the work (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object of what was done; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Score; returns the exit code."""
    from shardembed.recipes.use.files import check_out

    ranks = launch.ranks_of(arguments.ranks)
    check_out(arguments.out)
    run_in(Path(arguments.run))
    if ranks > 1 and not launch.in_job():
        words = ["score", arguments.run, "--data", *arguments.data, f"--out={arguments.out}", f"--columns={arguments.columns}"]
        words += [f"--on-bad-row={arguments.on_bad_row}", *["--json"] * arguments.json]
        return launch.run_ranks(ranks, words)
    return _work(arguments)


def _work(arguments: argparse.Namespace) -> int:
    from shardembed.config.console import CleanConsole
    from shardembed.recipes.use.files import writing
    from shardembed.recipes.use.opened import open_checkpoint
    from shardembed.recipes.use.score import Scored, scored

    launch.end_with_launcher()
    opened = open_checkpoint(arguments.run)
    along = tuple(name for name in arguments.columns.split(",") if name)
    told = Scored()
    with writing(arguments.out, opened.comm) as put:
        for table in scored(opened, tuple(arguments.data), along, arguments.on_bad_row == "skip", told):
            put(table)
    if opened.comm.rank == 0:
        _tell(CleanConsole(stderr=arguments.json), told, arguments.out)
        if arguments.json:
            found = {"out": str(arguments.out), "rows": told.rows, "unknown_rows": told.unknown, "dropped_rows": told.dropped.kinds}
            print(json.dumps({**found, "step": opened.step}), flush=True)
    launch.leave()
    return 0


def _tell(console: Any, told: Scored, out: Path) -> None:
    plain = {"highlight": False, "markup": False, "soft_wrap": True}
    if len(told.dropped):
        console.print(f"{len(told.dropped):,} rows left out ({told.dropped}); the first: {told.dropped.places[0]}", **plain)
    if told.unknown:
        console.print(f"{told.unknown:,} rows have no score: the model does not know the user or the item", **plain)
    console.print(f"{told.rows:,} rows scored in {out}", **plain)
