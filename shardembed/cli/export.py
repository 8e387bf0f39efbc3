"""`shardembed export CKPT --out DIR`: tables of a checkpoint as files for others, whole or some rows, narrower if wanted."""

from __future__ import annotations

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.cli.ids import ids_of
from shardembed.config.shown import ending
from shardembed.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from shardembed.embeddings import Exported, ExportedTable

MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shardembed.embeddings.compared import WHICH
    from shardembed.embeddings.formats import FORMATS
    from shardembed.embeddings.narrowing import CHOICES

    parser.add_argument("folder", type=Path, metavar="CKPT", help="folder of checkpoints, of one checkpoint, or of a run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--table", action="append", metavar="NAME", help="a table, or the end of its name; may be repeated (default: all)"
    )
    parser.add_argument("--format", choices=FORMATS, default="safetensors", help="default: safetensors")
    parser.add_argument("--dtype", choices=CHOICES, default="stored", help="int8 has a float32 scale a row (default: as stored)")
    parser.add_argument(
        "--vectors", choices=WHICH, default="rows", help="rows as they lie in the table (default), or what the model compares"
    )
    parser.add_argument("--rows", metavar="IDS", help="only these rows of one table, such as 3,17,100-199")
    parser.add_argument("--rows-file", type=Path, metavar="FILE", help="only these rows: an id a line, or a .npy file of integers")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: the newest)")
    parser.add_argument("--block", type=float, default=64.0, metavar="MIB", help="memory for rows at a time (default 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Export; returns the exit code."""
    from shardembed.cli.progress import bar
    from shardembed.cli.tables import folded
    from shardembed.config.console import console_for
    from shardembed.embeddings import export_tables
    from shardembed.embeddings.stored import StoredTables

    if arguments.block * MIB < 1:
        raise ConfigError(f"--block {arguments.block:g}: a block takes some memory")
    if arguments.out.exists() or arguments.out.is_symlink():  # known before anything is read
        raise ConfigError(f"--out: {arguments.out} exists, and is not written over: remove it, or name another folder")
    ids = ids_of(arguments.rows, arguments.rows_file)
    if ids is not None and len(arguments.table or ()) != 1:
        raise ConfigError("--rows and --rows-file choose rows of one table: name it with --table")
    with StoredTables(arguments.folder, arguments.step, arguments.vectors) as stored:
        tables = [stored.find(name) for name in arguments.table or stored.names]
        read = sum((table.rows if ids is None else len(ids)) * table.columns * table.dtype.itemsize for table in tables)
    with bar("exporting", read) as progress:
        done = export_tables(
            arguments.folder,
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
    console = console_for(sys.stderr if arguments.json else sys.stdout)
    console.print(f"exported step {done.step} ({done.checkpoint}) to {done.folder}", soft_wrap=True)
    console.print("", _table(done))
    for told, tables in groupby(done.tables, lambda table: table.told):
        console.print(folded(f"{_names(list(tables))}: {told}"), markup=False)
    if arguments.json:
        print(json.dumps({"out": str(done.folder), **done.as_json()}), flush=True)
    return 0


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
