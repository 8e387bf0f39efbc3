"""`shardembed doctor`: packages, the machine, and sharded tables against plain ones on its ranks; each problem with its fix."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.cli import launch
from shardembed.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shardembed.doctor.findings import Finding

PARITY = "parity"
MARKS = {"ok": "ok", "absent": "-", "note": "note", "problem": "PROBLEM"}
FIX = "look above and below for what else is wrong; with GPUs, NCCL_DEBUG=INFO says what NCCL does"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=int, metavar="N", help="compare on N ranks (default: one a GPU, else 2; 0 leaves it out)")
    parser.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="where runs are to be written (default: here)")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds for ranks to wait for each other (default 60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)  # for the ranks that this starts: where rank 0 answers


def run(arguments: argparse.Namespace) -> int:
    """Look at everything; returns the exit code, 1 where there is a problem."""
    if arguments.answers is not None:
        return _as_rank(arguments)
    if arguments.ranks is not None and arguments.ranks < 0:
        raise ConfigError(f"--ranks {arguments.ranks}: the number of ranks must be at least 1, or 0 for no comparison")
    if not arguments.timeout > 0:
        raise ConfigError(f"--timeout {arguments.timeout:g}: ranks cannot wait for less than no time")
    return _in_job(arguments) if launch.in_job() else _alone(arguments)


def _alone(arguments: argparse.Namespace) -> int:
    ranks = _default_ranks() if arguments.ranks is None else arguments.ranks
    findings = _local(max(1, ranks), arguments.dir)
    if ranks:
        findings += _on_ranks(ranks, arguments.timeout)
    return _tell(findings, arguments.json)


def _in_job(arguments: argparse.Namespace) -> int:
    """As a rank of a job that torchrun has started: every rank compares, rank 0 tells."""
    given = launch.ranks_of(arguments.ranks)
    compared = _compare(arguments.timeout)
    if os.environ["RANK"] != "0":
        return 0
    return _tell([*_local(given, arguments.dir), *_parity(compared, given)], arguments.json)


def _as_rank(arguments: argparse.Namespace) -> int:
    compared = _compare(arguments.timeout)
    if compared:
        arguments.answers.write_text(json.dumps(compared))
    return 0


def _default_ranks() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 2


def _local(ranks: int, folder: Path) -> list[Finding]:
    from shardembed.doctor import machine, packages

    return [*packages.check(packages.installed()), *machine.check(ranks, folder)]


def _on_ranks(ranks: int, timeout: float) -> list[Finding]:
    """Compare on ranks that are started here."""
    from shardembed.doctor.findings import problem

    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.json"
        told = launch.told_of(ranks, ["doctor", f"--answers={answers}", f"--timeout={timeout}"])
        if told is not None:
            return [problem(PARITY, f"{ranks} ranks", told.message.strip(), told.advice or FIX)]
        return _parity(json.loads(answers.read_text()), ranks)


def _compare(timeout: float) -> list[dict[str, str]]:
    """What `parity.compare` found, on rank 0."""
    import logging

    import shardembed as se
    from shardembed.doctor import parity

    logging.getLogger("shardembed").setLevel(logging.WARNING)  # else it names the kernel of every slab
    launch.end_with_launcher()
    comm = se.init(timeout=timeout)
    try:
        device = str(parity.default_device().type)
        return [{**asdict(each), "device": device} for each in parity.compare(comm)]
    finally:
        launch.leave()


def _parity(compared: Sequence[dict[str, str]], ranks: int) -> list[Finding]:
    from shardembed.doctor.findings import found, problem

    findings = []
    wrong = [each for each in compared if each["difference"]]
    for each in wrong:
        text = f"not as the plain table ({each['bound']}): {each['difference']}"
        fix = "do not train with this cut here; report it, with the output of `shardembed doctor --json`"
        findings.append(problem(PARITY, each["cut"], text, fix))
    right = [each for each in compared if not each["difference"]]
    where = f"{ranks} rank{'s' * (ranks > 1)} ({compared[0]['device']})"
    for bound in dict.fromkeys(each["bound"] for each in right):
        count, of = (sum(each["bound"] == bound for each in some) for some in (right, compared))
        findings.append(found(PARITY, bound, f"{count} of {of} cuts on {where}, lookup and update"))
    return findings


def _tell(findings: Sequence[Finding], as_json: bool) -> int:
    from shardembed.config.console import console_for

    problems = [each for each in findings if each.status == "problem"]
    if as_json:
        print(json.dumps({"ok": not problems, "findings": [asdict(each) for each in findings]}), flush=True)
    _show(console_for(sys.stderr if as_json else sys.stdout), findings)
    return 1 if problems else 0


def _show(console: Console, findings: Sequence[Finding]) -> None:
    from shardembed.planner import words

    for area in dict.fromkeys(each.area for each in findings):
        console.print(area, style="bold")
        console.print(_table([each for each in findings if each.area == area]))
        console.print("")
    wrong = [each for each in findings if each.status in ("note", "problem")]
    for number, each in enumerate(wrong, 1):
        console.print(f"{number}. {MARKS[each.status]}: {each.name}", style="bold")
        console.print(f"   {each.text}", soft_wrap=True, markup=False)
        console.print(f"   fix: {each.fix}", soft_wrap=True, markup=False)
    problems = sum(each.status == "problem" for each in wrong)
    if problems:
        console.print(f"\n{words.plural(problems, 'problem')} found", style="bold")
    else:
        console.print("no problems found", style="bold")


def _table(findings: Sequence[Finding]) -> Table:
    from shardembed.cli.tables import plain_table

    table = plain_table("", ["", "", ""], [])
    table.show_header = False
    for column, least in zip(table.columns, (7, 24, 0), strict=True):  # the same for all areas
        column.min_width = least
    for each in findings:
        table.add_row(MARKS[each.status], each.name, each.text)
    return table
