"""`shardembed recommend RUN --users FILE --out recs.parquet`: the best items for users, by name, from a run of `train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardembed.cli import launch
from shardembed.cli.given import run_in
from shardembed.config.paths import is_url
from shardembed.errors import ConfigError, DataError

if TYPE_CHECKING:
    from shardembed.recipes.use.recommend import Answered

UNKNOWN = ("leave_out", "popular")  # as `use.recommend` has them, whose import waits for torch
SHOWN = 10  # users on a terminal, where no file was asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a run of `shardembed train`")
    parser.add_argument(
        "--users",
        required=True,
        metavar="FILE",
        help="a CSV, TSV or Parquet file with the column of users that the run's data have, a file of one name a line, or all",
    )
    parser.add_argument("--k", type=int, default=10, metavar="K", help="how many items for each user (default 10)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="what to write: .parquet, .csv, .tsv or .jsonl")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out what each user has in the run's data")
    parser.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="interactions to be read in the place of the run's, for --exclude-seen",
    )
    parser.add_argument(
        "--history", nargs="+", default=[], metavar="FILE", help="of sequences: interactions that are gone on from, new users' too"
    )
    parser.add_argument(
        "--unknown", choices=UNKNOWN, default="leave_out", help="what users get whom the model does not know (default: leave_out)"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine, which share the work (default 1)")
    parser.add_argument("--json", action="store_true", help="print one JSON object of what was done; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Recommend; returns the exit code."""
    from shardembed.recipes.ctr_config import CTR_MODELS
    from shardembed.recipes.use.files import check_out
    from shardembed.recipes.use.ranking import NO_RANKING

    ranks = launch.ranks_of(arguments.ranks)
    check_out(arguments.out)
    if run_in(Path(arguments.run)).model.kind in CTR_MODELS:
        raise ConfigError(f"{arguments.run}: {NO_RANKING}")
    if arguments.users != "all" and not is_url(arguments.users) and not Path(arguments.users).exists():
        raise ConfigError(
            f"--users {arguments.users}: there is no such file; to recommend to all that the model knows, say: --users all"
        )
    if ranks > 1 and not launch.in_job():
        words = ["recommend", arguments.run, f"--users={arguments.users}", f"--k={arguments.k}", f"--out={arguments.out}"]
        words += ["--exclude-seen"] * arguments.exclude_seen + ["--json"] * arguments.json + [f"--unknown={arguments.unknown}"]
        for name in ("data", "history"):
            words += [f"--{name}", *getattr(arguments, name)] if getattr(arguments, name) else []
        return launch.run_ranks(ranks, words)
    return _work(arguments)


def _work(arguments: argparse.Namespace) -> int:
    from shardembed.config.console import CleanConsole
    from shardembed.recipes.together import on_all
    from shardembed.recipes.use.files import writing
    from shardembed.recipes.use.opened import open_checkpoint
    from shardembed.recipes.use.recommend import Answered, Wish, recommended

    launch.end_with_launcher()
    opened = open_checkpoint(arguments.run)
    comm = opened.comm
    asked: Any = arguments.users
    left_out = 0
    if asked != "all":
        data = opened.config.data
        asked, left_out = on_all(comm, "read the users", lambda: _read(arguments.users, data.user, data.on_bad_row == "skip"))
    told = Answered()
    wish = Wish(arguments.k, arguments.exclude_seen, tuple(arguments.data), tuple(arguments.history), arguments.unknown)
    pieces = recommended(opened, asked, wish, told)
    rows = 0
    with writing(arguments.out, comm) as put:
        for table in pieces:
            rows += table.num_rows
            put(table)
    if comm.rank == 0:
        console = CleanConsole(stderr=arguments.json)
        if left_out:
            console.print(f"{left_out:,} bad rows of {arguments.users} left out", highlight=False, markup=False, soft_wrap=True)
        _tell(console, told, rows, arguments.out, arguments.unknown)
        if arguments.json:
            found = {
                "out": str(arguments.out),
                "rows": rows,
                "users": told.users,
                "unknown_users": told.unknown,
                "left_out_rows": left_out,
                "step": opened.step,
            }
            print(json.dumps(found), flush=True)
    launch.leave()
    return 0


def _read(path: str, column: str, skip: bool) -> tuple[Any, int]:
    """As `names_in`; a file without users is hardly the one that is meant."""
    from shardembed.recipes.use.files import names_in

    found, left_out = names_in(path, column, skip)
    if not len(found):
        raise DataError(f"--users {path}: there are no users in it; to recommend to all that the model knows, say: --users all")
    return found, left_out


def _tell(console: Any, told: Answered, rows: int, out: Path, unknown: str) -> None:
    if told.unknown:
        some = ", ".join(map(repr, told.some)) + (", ..." if told.unknown > len(told.some) else "")
        got = "got what is popular" if unknown == "popular" else "got nothing"
        listed = f" ({some})" if told.some else ""
        console.print(
            f"{told.unknown:,} of {told.users:,} users are unknown to the model and {got}{listed}", highlight=False, markup=False
        )
    console.print(f"{rows:,} recommendations for {told.users:,} users in {out}", highlight=False, markup=False, soft_wrap=True)
