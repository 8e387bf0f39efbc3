"""`shardembed neighbors CKPT --table item --id 42`: the nearest rows of a table, exact, straight from a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.cli.ids import id_of
from shardembed.config.shown import beginning

if TYPE_CHECKING:
    from rich.table import Table

    from shardembed.embeddings import Neighbors

NAME = 44  # characters of a name in a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shardembed.cli.tables import VECTORS
    from shardembed.embeddings.compared import METRICS, WHICH

    parser.add_argument("folder", type=Path, metavar="CKPT", help="folder of checkpoints, of one checkpoint, or of a run")
    parser.add_argument("--table", required=True, metavar="NAME", help="the table, or the end of its name")
    parser.add_argument(
        "--id",
        type=id_of,
        nargs="+",
        action="extend",
        required=True,
        metavar="ID",
        help="rows to find neighbours of: numbers, or texts of which the se.hash64 are ids",
    )
    parser.add_argument("--k", type=int, default=10, metavar="K", help="how many neighbours of each (default 10)")
    parser.add_argument("--metric", choices=METRICS, help="default: the model's, or cosine where that is not known")
    parser.add_argument("--vectors", choices=WHICH, help=VECTORS)
    parser.add_argument(
        "--names", type=Path, metavar="FILE", help="names of rows, one a line: line 1 names id 0; or a folder of se.Names"
    )
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: a run's best, or the newest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Find them; returns the exit code."""
    from shardembed.cli.tables import folded
    from shardembed.config.console import console_for
    from shardembed.embeddings import neighbors
    from shardembed.embeddings.names import names_of
    from shardembed.embeddings.nearest import metric_of
    from shardembed.embeddings.stored import StoredTables

    asked = list(dict.fromkeys(arguments.id))
    with StoredTables(arguments.folder, arguments.step, arguments.vectors) as stored:
        table = stored.find(arguments.table)
        metric = metric_of(table, arguments.metric)
    found = neighbors(stored.path, table.key, asked, arguments.k, metric=metric, vectors=table.vectors)
    names: dict[int, str] = {}
    if arguments.names is not None:
        names = names_of(arguments.names, [each for near in found for each in (near.id, *near.ids)])
    if arguments.json:
        told = {"table": arguments.table, "metric": metric, "vectors": table.vectors, "told": table.told}
        print(json.dumps({**told, "queries": [_line(near, names) for near in found]}))
        return 0
    console = console_for(sys.stdout)
    for place, near in enumerate(found):
        if place:
            console.print("")
        console.print(_heading(near, names, arguments.table), style="bold")  # a table's own title is folded to its width
        console.print(_table(near, names, metric))
    console.print("")
    console.print(folded(f"{metric} of {table.told}"), markup=False)
    return 0


def _line(near: Neighbors, names: dict[int, str]) -> dict[str, object]:
    def named(row: int) -> dict[str, object]:
        return {"id": row, **({"name": names[row]} if names else {})}

    pairs = zip(near.ids, near.scores, strict=True)
    return {**named(near.id), "neighbors": [{**named(row), "score": score} for row, score in pairs]}


def _heading(near: Neighbors, names: dict[int, str], table: str) -> str:

    what = f"id {near.id}" + (f", {beginning(names[near.id], NAME)}" if names else "")
    return f"nearest rows of {beginning(table, 20)} to {what}"


def _table(near: Neighbors, names: dict[int, str], metric: str) -> Table:
    from shardembed.cli.tables import plain_table

    columns = ["rank", "id", metric, *(["name"] if names else [])]
    shown = plain_table("", columns, ["rank", "id", metric])
    for rank, (row, score) in enumerate(zip(near.ids, near.scores, strict=True), 1):
        number = f"{score:.4f}" if metric == "cosine" else f"{score:.5g}"
        shown.add_row(str(rank), str(row), number, *([beginning(names[row], NAME)] if names else []))
    return shown
