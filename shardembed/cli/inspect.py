"""`shardembed inspect DIR`: the checkpoints in a folder, what one holds, and with `--verify` whether all is as it was saved; of the
folder of a training run, the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardembed.cli import inspect_run
from shardembed.cli.given import checkpoint_in
from shardembed.cli.progress import bar
from shardembed.cli.tables import plain_table
from shardembed.config.shown import ending, one_line
from shardembed.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from shardembed.checkpoint.describe import Contents
    from shardembed.checkpoint.describe import Table as Stored
    from shardembed.checkpoint.format.manifest import Manifest
    from shardembed.checkpoint.format.verify import Problem
    from shardembed.tables.plan import Plan

MOST = 40  # tables that are listed
NAME = 40  # characters of a name in a table
PROBLEMS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of checkpoints, of one checkpoint, or of a run")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: a run's best, or the newest)")
    parser.add_argument(
        "--verify", action="store_true", help="hash everything again, of all checkpoints in the folder unless --step names one"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Inspect; returns the exit code, 1 where something is damaged."""
    from shardembed.checkpoint.describe import contents
    from shardembed.checkpoint.format.manifest import read_manifest, resolve
    from shardembed.config.console import console_for
    from shardembed.embeddings.of_run import BEST, CHECKPOINTS
    from shardembed.recipes.run_folder import is_run

    console = console_for(sys.stderr if arguments.json else sys.stdout)
    of_run = is_run(arguments.folder)
    if of_run and not arguments.verify and arguments.step is None:
        return inspect_run.run(arguments.folder, console, arguments.json)
    path = checkpoint_in(arguments.folder, arguments.step)
    roots = [arguments.folder] if path != arguments.folder else []
    roots = [arguments.folder / name for name in (CHECKPOINTS, BEST)] if of_run else roots
    manifests, unread = _read_all(roots, path)
    found: dict[str, Any] = {"checkpoints": [_line(folder, manifests.get(folder)) for folder in [*manifests, *unread]]}
    if roots:
        console.print(_listing(manifests, unread))
    if path in manifests:
        held = contents(path, manifests[path])
        if arguments.step is not None and held.manifest.step != arguments.step:
            raise ConfigError(f"{path} is the checkpoint of step {held.manifest.step}, and not of step {arguments.step}")
        found["checkpoint"] = held.as_json()
        _show(console, held)
    elif not arguments.verify or arguments.step is not None:
        raise CheckpointError(unread[path])
    if arguments.verify:
        if not roots or arguments.step is not None:
            manifests, _ = resolve(read_manifest(path), path)
        problems = _verify(console, manifests, {} if arguments.step is not None else unread)
        found["problems"] = [
            {"folder": str(each.folder), "file": each.file, "tensor": each.key, "text": each.text} for each in problems
        ]
    if arguments.json:
        print(json.dumps(found), flush=True)
    return 1 if found.get("problems") else 0


def _read_all(roots: Sequence[Path], path: Path) -> tuple[dict[Path, Manifest], dict[Path, str]]:
    """The manifest of each checkpoint, and why there is none that can be read."""
    from shardembed.checkpoint import folders
    from shardembed.checkpoint.format.manifest import read_manifest, resolve

    manifests: dict[Path, Manifest] = {}
    unread: dict[Path, str] = {}
    for folder in [folder for root in roots for _, folder in folders.checkpoints(root)] if roots else [path]:
        try:
            manifests[folder] = read_manifest(folder)
            resolve(manifests[folder], folder)  # what it stands on must be there too
        except CheckpointError as error:
            manifests.pop(folder, None)
            unread[folder] = str(error)
    return manifests, unread


def _line(folder: Path, manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {"path": str(folder), "readable": False}
    lost = list(manifest.nonfinite)
    return {"path": str(folder), "readable": True, "step": manifest.step, "stored_bytes": _stored(manifest), "nonfinite": lost}


def _age(folder: Path) -> tuple[object, str]:
    """Sorts checkpoints in the order in which they were saved."""
    from shardembed.checkpoint.folders import Named

    return Named.of(folder.name) or Named(0, 0, 0), folder.name


def _stored(manifest: Manifest) -> int:
    return sum(file.bytes for file in manifest.files.values())


def _listing(manifests: dict[Path, Manifest], unread: dict[Path, str]) -> Table:
    from shardembed.embeddings.of_run import BEST
    from shardembed.planner import words

    table = plain_table("checkpoints", ["checkpoint", "saved", "size"], ["ranks", "size"])
    for folder in sorted([*manifests, *unread], key=_age):
        manifest = manifests.get(folder)
        name = f"{BEST}/{folder.name}" if folder.parent.name == BEST else folder.name
        if manifest is None:
            table.add_row(name, "cannot be read", "")
            continue
        what = "" if manifest.base is None else f", changes since {manifest.base.folder}"
        what += ", holds inf or nan" * bool(manifest.nonfinite)
        table.add_row(
            name, f"{manifest.created} on {words.plural(manifest.world_size, 'rank')}{what}", words.size(_stored(manifest))
        )
    return table


def _show(console: Console, held: Contents) -> None:
    from shardembed.checkpoint.retention import said
    from shardembed.planner import words

    manifest = held.manifest
    files = words.plural(len(manifest.files), "file")
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    console.print(f"\nstep {manifest.step}, saved {manifest.created} on {words.plural(manifest.world_size, 'rank')}", style="bold")
    console.print(str(held.path), soft_wrap=True)
    console.print(f"{words.size(held.stored_bytes)} in {files}; {versions}")
    if manifest.base is not None:
        console.print(f"holds the rows that changed since {manifest.base.folder}, which it needs")
    if manifest.nonfinite:
        console.print(one_line(f"inf or nan is in {said(manifest.nonfinite)}"), style="bold", soft_wrap=True)
    console.print("", _tables(held))
    if held.dense:
        state = f", optimizer state {words.size(held.dense_state_bytes)}" if held.dense_state_bytes else ""
        console.print(f"\n{words.plural(held.dense, 'dense tensor')}, {words.size(held.dense_bytes)}{state}")
    for plan in held.plans:
        console.print("", _plan(plan) if not isinstance(plan, str) else f"a plan cannot be read: {plan}")


def _tables(held: Contents) -> Table:
    from shardembed.planner import words

    changes = held.manifest.base is not None
    names = ["table", "rows", "columns", "dtype", "size", "in this folder" if changes else "chunks", "state", "state size"]
    table = plain_table("tables", names, [name for name in names if name not in ("table", "dtype", "state")])
    largest = sorted(held.tables, key=lambda each: -each.bytes)
    for each in largest[:MOST]:
        stored = f"{each.updated_rows:,} rows" if changes and not each.chunks else f"{each.chunks}"
        columns = " x ".join(map(str, each.shape[1:])) or "1"
        state = ", ".join(each.state) or "-"
        size = words.size(each.state_bytes) if each.state else ""
        table.add_row(
            ending(each.key, NAME),
            _rows(each),
            columns,
            each.dtype,
            words.size(each.bytes),
            stored,
            state,
            size,
        )
    if len(largest) > MOST:
        rest = largest[MOST:]
        table.add_row(f"and {len(rest)} more", "", "", "", words.size(sum(each.bytes for each in rest)), "", "", "")
    return table


def _rows(table: Stored) -> str:
    """How many there are; of a dynamic table, of how many there may be."""
    rows = f"{table.shape[0]:,}" if table.shape else "1"
    return rows if table.capacity is None else f"{rows} of {table.capacity:,}"


def _plan(plan: Plan) -> Table:
    from shardembed.planner import words

    table = plain_table(
        f"plan for {words.plural(plan.world_size, 'rank')}", ["table", "cut", "packing", "shards", "on ranks"], ["shards"]
    )
    for each in plan.tables[:MOST]:
        ranks = words.rank_list(each.layout.ranks)
        table.add_row(ending(each.name, NAME), each.kind, each.packing, str(len(each.layout.shards)), ranks)
    if len(plan.tables) > MOST:
        table.add_row(f"and {len(plan.tables) - MOST} more", "", "", "", "")
    return table


def _verify(console: Console, manifests: dict[Path, Manifest], unread: dict[Path, str]) -> list[Problem]:
    from shardembed.checkpoint.format.verify import Problem, size_of, verify_each
    from shardembed.planner import words

    total = size_of(manifests)
    with bar("verifying", total) as progress:
        problems = [Problem(folder, "", "", text) for folder, text in unread.items()]
        problems += verify_each(manifests, progress=progress)
    console.print("")
    for each in problems[:PROBLEMS]:
        console.print(each.text, soft_wrap=True, style="bold")
    if len(problems) > PROBLEMS:
        console.print(f"and {len(problems) - PROBLEMS} more")
    checked = f"{words.size(total)} in {words.plural(len(manifests), 'checkpoint')}"
    if problems:
        console.print(f"{words.plural(len(problems), 'problem')} found in {checked}")
    else:
        console.print(f"verified: {checked} hashed, all as it was saved")
    return problems
