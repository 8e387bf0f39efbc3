"""`shardembed calibrate`: measure this machine, on ranks started here or as the ranks of a job, and write a topology file."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from pathlib import Path

from shardembed.cli import launch
from shardembed.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("topology.yaml"), metavar="FILE", help="default: topology.yaml")
    parser.add_argument("--name", help="what the topology is called (default: the name of this host)")
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine (default: one a GPU, else 2)")
    parser.add_argument("--seconds", type=float, default=26.0, metavar="S", help="how long to time steps (default 26)")
    parser.add_argument("--json", action="store_true", help="print the topology as one JSON line; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Calibrate; returns the exit code."""
    launch.ranks_of(arguments.ranks)  # which refuses what cannot be
    if not arguments.seconds > 0:
        raise ConfigError(f"--seconds {arguments.seconds:g}: timing takes more than no time")
    folder = arguments.out.absolute().parent
    if not folder.is_dir():  # before a minute is spent
        raise ConfigError(f"--out {arguments.out}: there is no folder {folder}")
    if launch.in_job():
        return _calibrate(arguments)
    ranks = arguments.ranks or _default_ranks()
    if ranks == 1:
        return _calibrate(arguments)
    words = ["calibrate", f"--out={arguments.out}", f"--seconds={arguments.seconds}"]
    words += [f"--name={arguments.name}"] if arguments.name else []
    return launch.run_ranks(ranks, words + ["--json"] * arguments.json)


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def _calibrate(arguments: argparse.Namespace) -> int:
    import torch

    import shardembed as se
    from shardembed.config.console import CleanConsole
    from shardembed.planner import calibrate
    from shardembed.planner.topology import to_yaml

    logging.getLogger("shardembed").setLevel(logging.WARNING)  # else it names the kernel of every slab
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    se.init()
    console = CleanConsole(stderr=arguments.json, quiet=se.rank() != 0)
    name = arguments.name or platform.node() or "here"
    topology = calibrate.calibrate(name, arguments.seconds, say=lambda text: console.print(text, highlight=False))
    if se.rank() == 0:
        text = to_yaml(topology)
        arguments.out.write_text(f"# Written by `shardembed calibrate`; plan with `--topology {arguments.out}`.\n{text}")
        console.print(f"wrote {arguments.out}", highlight=False)
        if arguments.json:
            print(json.dumps({"out": str(arguments.out), "name": name, "ranks": topology.ranks, **topology.source}))
    launch.leave()
    return 0
