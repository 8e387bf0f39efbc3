"""The console script `shardembed`: one module a subcommand, imported only when it is called for.

A subcommand's module has `add_arguments(parser)` and `run(arguments) -> int`, the exit code: 0, 2 where configuration, data or
arguments are wrong, 1 for every other failure.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import NoReturn

from shardembed._version import __version__
from shardembed.cli import failures
from shardembed.config.hints import nearest
from shardembed.config.paths import elsewhere
from shardembed.config.shown import printable
from shardembed.errors import ShardEmbedError

COMMANDS = {  # name (also of the module) -> what it does
    "plan": "cut the tables of a model over the ranks of a cluster, with a proof of how good the plan is",
    "bench": "measure training steps of this machine, beside the peers that are installed",
    "calibrate": "measure this machine, and write a topology file for the planner",
    "convert": "turn a checkpoint of TorchRec, from a source you trust, into one of shardembed",
    "doctor": "look for what is wrong with an installation, and prove sharded tables equal to plain ones on its ranks",
    "inspect": "show what a checkpoint holds and whether all of it is as it was saved, or how a run went",
    "export": "write tables of a checkpoint as safetensors, .npy or Parquet files",
    "map": "draw a table as a picture, by its first two principal components",
    "neighbors": "find the nearest rows of a table, straight from a checkpoint",
    "recommend": "recommend items to users, by name, with a model of train",
    "score": "score rows without labels, with a model of train",
    "serve": "make a folder that answers requests on a CPU box, for a model of train, and serve it over HTTP",
    "train": "train and evaluate a model from a configuration file",
}
READ = ("guess", "users", "data", "history")  # arguments that name data, which may be anywhere
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit code. Wrong arguments and --help exit, as argparse does."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # the process is this command's
        sys.excepthook = failures.unexpected
    if words and not words[0].startswith("-") and words[0] not in COMMANDS:
        return _unknown(words[0])
    arguments = _parser(words).parse_args(words)
    for value in _values(arguments):
        if said := elsewhere(value):
            failures.say(said)
            return failures.WRONG
    module = importlib.import_module(f"shardembed.cli.{arguments.command}")
    try:
        with failures.interrupts_arrive():
            return module.run(arguments)
    except ShardEmbedError as error:
        return failures.report(error)
    except KeyboardInterrupt as error:
        if argv is None:  # a second one ends the process at once, without a traceback of how it was ending
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if str(error) and failures.QUIET not in os.environ:
            failures.note(str(error))
        return INTERRUPTED
    except Exception as error:
        if not failures.in_launched_rank():
            raise
        return failures.report(error)


def _values(arguments: argparse.Namespace) -> Iterator[str | PurePath]:
    """What was given to options and in their place, each alone."""
    for name, value in vars(arguments).items():
        if name in READ:
            continue
        yield from (one for one in (value if isinstance(value, list | tuple) else (value,)) if isinstance(one, str | PurePath))


def _unknown(word: str) -> int:
    failures.say(f"{word!r} is not a command{nearest(word, COMMANDS)} (commands: {', '.join(COMMANDS)})")
    return failures.WRONG


class _Parser(argparse.ArgumentParser):
    """One whose complaints, which repeat what was typed, go through the door that all errors go through."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser("shardembed", description="Sharded embedding tables for PyTorch.")
    parser.add_argument("--version", action="version", version=f"shardembed {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, purpose in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.")
        if name == chosen:
            importlib.import_module(f"shardembed.cli.{name}").add_arguments(command)
    return parser
