"""`shardembed export RUN --out DIR`: the vectors that a run's model compares, or tables of a checkpoint, as files for others, whole
or some rows, narrower if wanted.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.cli import launch
from shardembed.cli.given import check_new, checkpoint_in
from shardembed.cli.ids import ids_of
from shardembed.config.hints import nearest
from shardembed.config.shown import ending
from shardembed.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from shardembed.embeddings import Exported, ExportedTable

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shardembed.embeddings.compared import WHICH
    from shardembed.embeddings.formats import FORMATS
    from shardembed.embeddings.narrowing import CHOICES

    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run, of checkpoints, or of one checkpoint")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--table", action="append", metavar="NAME", help="a table, or the end of its name; may be repeated (default: all)"
    )
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    parser.add_argument("--dtype", choices=CHOICES, default="stored", help="int8 has a float32 scale a row (default: as stored)")
    parser.add_argument(
        "--vectors",
        choices=WHICH,
        help="what the model compares (default where a run is given whose model ranks items), or rows as they lie in the table",
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="of a run's vectors: on N ranks of this machine (default 1)")
    parser.add_argument("--rows", metavar="IDS", help="only these rows of one table, such as 3,17,100-199")
    parser.add_argument("--rows-file", type=Path, metavar="FILE", help="only these rows: an id a line, or a .npy file of integers")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: a run's best, or the newest)")
    parser.add_argument("--block", type=float, default=64.0, metavar="MIB", help="memory for rows at a time (default 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit code."""
    from shardembed.cli.progress import bar
    from shardembed.embeddings import export_tables
    from shardembed.embeddings.stored import StoredTables

    if arguments.block * MIB < 1:
        raise ConfigError(f"--block {arguments.block:g}: a block takes some memory")
    check_new(arguments.out)
    ids = ids_of(arguments.rows, arguments.rows_file)
    if ids is not None and len(arguments.table or ()) != 1:
        raise ConfigError("--rows and --rows-file choose rows of one table: name it with --table")
    if _of_run(arguments):
        return _vectors(arguments, ids)
    if arguments.ranks is not None:
        raise ConfigError("--ranks: tables of a checkpoint are read by one process; it goes with the vectors of a run")
    arguments.vectors = arguments.vectors or "rows"
    checkpoint = checkpoint_in(arguments.folder, arguments.step)
    with StoredTables(checkpoint, arguments.step, arguments.vectors) as stored:
        tables = [stored.find(name) for name in arguments.table or stored.names]
        read = sum((table.rows if ids is None else len(ids)) * table.columns * table.dtype.itemsize for table in tables)
    with bar("exporting", read) as progress:
        done = export_tables(
            checkpoint,
            arguments.out,
            arguments.table,
            rows=None if ids is None else {arguments.table[0]: ids},
            format=arguments.format,
            dtype=arguments.dtype,
            step=arguments.step,
            vectors=arguments.vectors,
            block_bytes=int(arguments.block * MIB),
            progress=progress,
        )
    _tell(arguments, done)
    return 0


def _of_run(arguments: argparse.Namespace) -> bool:
    """The vectors of a run's model are asked for, rather than tables of a checkpoint."""
    from shardembed.recipes.ctr_config import CTR_MODELS
    from shardembed.recipes.run_folder import is_run
    from shardembed.recipes.use.opened import config_of

    if arguments.vectors == "rows" or not is_run(arguments.folder):
        return False
    return config_of(arguments.folder).model.kind not in CTR_MODELS


def _vectors(arguments: argparse.Namespace, ids: torch.Tensor | None) -> int:
    from shardembed.recipes.use.export import export_vectors
    from shardembed.recipes.use.opened import open_checkpoint
    from shardembed.recipes.use.vectors import SIDES

    sides = tuple(dict.fromkeys(name.rpartition(".")[2] for name in arguments.table or SIDES))
    if strange := [side for side in sides if side not in SIDES]:
        raise ConfigError(
            f"--table {strange[0]}: a run's model compares vectors of {' and '.join(SIDES)}"
            f"{nearest(strange[0], SIDES)}; tables as they lie: --vectors rows"
        )
    ranks = launch.ranks_of(arguments.ranks)
    if ranks > 1 and not launch.in_job():
        return launch.run_ranks(ranks, _words(arguments))
    launch.end_with_launcher()
    opened = open_checkpoint(arguments.folder, arguments.step)
    done = export_vectors(
        opened,
        arguments.out,
        sides,
        rows=None if ids is None else {sides[0]: ids},
        format=arguments.format,
        dtype=arguments.dtype,
        block_bytes=int(arguments.block * MIB),
    )
    if opened.comm.rank == 0:
        _tell(arguments, done)
    launch.leave()
    return 0


def _words(arguments: argparse.Namespace) -> list[str]:
    """The command, for each rank."""
    words = [
        "export",
        str(arguments.folder),
        f"--out={arguments.out}",
        f"--format={arguments.format}",
        f"--dtype={arguments.dtype}",
    ]
    words += [f"--block={arguments.block}", *(f"--table={name}" for name in arguments.table or ()), *["--json"] * arguments.json]
    for name in ("rows", "rows_file", "step", "vectors"):
        value = getattr(arguments, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}={value}"]
    return words


def _tell(arguments: argparse.Namespace, done: Exported) -> None:
    from shardembed.cli.tables import folded
    from shardembed.config.console import console_for

    console = console_for(sys.stderr if arguments.json else sys.stdout)
    console.print(f"exported step {done.step} ({done.checkpoint}) to {done.folder}", soft_wrap=True)
    console.print("", _table(done))
    for told, tables in groupby(done.tables, lambda table: table.told):
        console.print(folded(f"{_names(list(tables))}: {told}"), markup=False)
    if arguments.json:
        print(json.dumps({"out": str(done.folder), **done.as_json()}), flush=True)


def _names(tables: list[ExportedTable]) -> str:
    first, last = ending(tables[0].name, 24), ending(tables[-1].name, 24)
    return first if len(tables) == 1 else f"{first} and {last}" if len(tables) == 2 else f"{first} to {last}"


def _table(done: Exported) -> Table:
    from shardembed.cli.tables import plain_table
    from shardembed.planner import words

    table = plain_table("", ["table", "rows", "columns", "dtype", "size"], ["rows", "columns", "size"])
    for each in done.tables:
        rows = f"{each.rows:,}" if each.rows == each.table_rows else f"{each.rows:,} of {each.table_rows:,}"
        dtype = each.dtype if each.dtype == each.stored_dtype else f"{each.dtype} (was {each.stored_dtype})"
        table.add_row(ending(each.name, 24), rows, str(each.columns), dtype, words.size(each.bytes))
    return table
