"""`shardembed train CONFIG`: train and evaluate a model, in this process, on several local ranks, or as a rank of a job.

A run that was interrupted is resumed by the same command, on the same or another number of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from shardembed.cli import launch
from shardembed.config.shown import printable
from shardembed.errors import ConfigError, ShardEmbedError

if TYPE_CHECKING:
    from shardembed.recipes.common import JobConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="YAML file, or the name of one that comes along, such as quickstart"
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine (default 1)")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="when a rank fails, start all again up to N times; they resume"
    )
    parser.add_argument("--fresh", action="store_true", help="begin a new run; without it, an interrupted one is resumed")
    parser.add_argument(
        "--from",
        dest="former",
        metavar="RUN",
        help="begin with the model of a finished run, or of the `last` one of this name: ids keep their rows, and its metrics on "
        "these data are shown beside those of the new model",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop training after N steps")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a setting, such as train.epochs=3; may be repeated",
    )
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="train nothing: evaluate this checkpoint, or the best of a run")
    parser.add_argument("--predict", metavar="FOLDER", help="with --evaluate: write predictions as Parquet files, one a rank")
    parser.add_argument("--dry-run", action="store_true", help="train nothing: check the data, plan for --ranks, count memory")
    parser.add_argument("--print-config", action="store_true", help="print the settings with all defaults, and end")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of CONFIG, for editors, and end")
    parser.add_argument("--guess", metavar="FILE", help="write a first configuration from the columns of a data file, and end")
    parser.add_argument("--out", metavar="YAML", help="with --guess: where to write it, in place of the terminal")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON line; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Train; returns the exit code."""
    from shardembed.recipes import config
    from shardembed.recipes.data.choose import check_data

    if arguments.schema:
        print(json.dumps(config.schema(), indent=2))
        return 0
    if arguments.guess is not None:
        return _guess(arguments)
    _check_arguments(arguments)
    overrides = list(arguments.overrides)
    if arguments.max_steps is not None:
        overrides.append(f"train.max_steps={arguments.max_steps}")
    # Before any rank is started, so that mistakes in the configuration and a file or column that is not there show at once.
    arguments.config = _file(arguments.config)
    settings = config.load(arguments.config, overrides)
    if arguments.print_config:
        from shardembed.recipes.resolved import resolved_yaml

        print(printable(resolved_yaml(settings)))
        return 0
    ranks = launch.ranks_of(arguments.ranks)
    if arguments.dry_run:
        return _dry_run(settings, ranks, arguments.json)
    if arguments.evaluate is None:
        from shardembed.recipes import tracking

        tracking.check(settings.log)
    restarts = _restarts(arguments.max_restarts)
    if (ranks > 1 or restarts) and not launch.in_job():
        check_data(settings)
        words = ["train", arguments.config, *(f"--set={override}" for override in overrides)]
        for name in ("evaluate", "predict"):
            if getattr(arguments, name) is not None:
                words.append(f"--{name}={getattr(arguments, name)}")
        words += ["--json"] * arguments.json + ["--fresh"] * arguments.fresh
        words += [f"--from={arguments.former}"] if arguments.former is not None else []
        return launch.run_ranks(ranks, words, restarts, partial(_left, settings) if arguments.evaluate is None else None)
    return _work(settings, arguments)


def _left(settings: JobConfig, run_id: str) -> str:
    """What ranks that were stopped have left to go on from, in words."""
    from shardembed.recipes import runs

    with suppress(ShardEmbedError, OSError):  # a failure has been told already
        return runs.saved_by(settings, runs.job_of_launch(run_id, os.getpid()))
    return ""


def _file(name_or_path: str) -> str:
    """The configuration that is meant: a file, or one that comes along."""
    if os.path.isfile(name_or_path):
        return name_or_path
    from shardembed.planner import builtin  # takes a second to import

    return str(builtin.locate("train", name_or_path))


def _restarts(wanted: int) -> int:
    if wanted < 0:
        raise ConfigError(f"--max-restarts {wanted}: the number of restarts must be at least 0")
    if wanted and launch.in_job():
        raise ConfigError(
            "--max-restarts: this process belongs to a job already; give --max-restarts to what started it (torchrun)"
        )
    return wanted


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.config is None:
        raise ConfigError("which configuration? Give a YAML file, or the name of one that comes along, such as quickstart")
    if arguments.out is not None:
        raise ConfigError("--out goes with --guess FILE")
    if arguments.former is not None and (arguments.evaluate is not None or arguments.dry_run):
        raise ConfigError("--from says what training begins with; leave it out, or --evaluate and --dry-run")
    if arguments.predict is not None and arguments.evaluate is None:
        raise ConfigError("--predict goes with --evaluate CHECKPOINT: predictions are a trained model's")
    if arguments.dry_run and launch.in_job():
        raise ConfigError("--dry-run works in one process: leave the launcher out, and say --ranks N")


def _guess(arguments: argparse.Namespace) -> int:
    from shardembed.config.console import CleanConsole
    from shardembed.recipes import guess

    if arguments.config is not None:
        raise ConfigError(f"--guess writes a configuration, and takes none: leave {arguments.config} out, or say --out")
    text = guess.run(arguments.guess, arguments.out, CleanConsole(stderr=True))
    if arguments.out is None:
        print(printable(text), end="")
    return 0


def _dry_run(settings: JobConfig, ranks: int, as_json: bool) -> int:
    from shardembed.config.console import CleanConsole
    from shardembed.recipes import dry_run

    found = dry_run.run(settings, CleanConsole(stderr=as_json), ranks)
    if as_json:
        print(json.dumps(found))
    return 0


def _work(settings: JobConfig, arguments: argparse.Namespace) -> int:
    """Train or evaluate, as one rank."""
    from shardembed.config.console import CleanConsole
    from shardembed.recipes import evaluation, train

    launch.end_with_launcher()
    console = CleanConsole(stderr=arguments.json)
    if arguments.evaluate is not None:
        summary = evaluation.run(settings, console, arguments.evaluate, arguments.predict)
        speaks = int(os.environ.get("RANK", "0")) == 0
    else:
        summary = train.run(settings, console, arguments.fresh, arguments.former)
        speaks = summary["run_dir"] is not None
    if arguments.json and speaks:
        print(json.dumps(summary))
    launch.leave()
    return 0
