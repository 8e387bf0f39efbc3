"""`shardembed neighbors CKPT --table item --id 42`: the nearest rows of a table, exact, straight from a checkpoint."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.cli.given import checkpoint_in
from shardembed.cli.ids import id_of
from shardembed.config.shown import beginning
from shardembed.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from shardembed.embeddings import Neighbors
    from shardembed.embeddings.stored import StoredTable
    from shardembed.recipes.use.row_names import RowNames
    from shardembed.recipes.use.vectors import MadeRows

NAME = 44  # characters of a name in a table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shardembed.cli.tables import VECTORS
    from shardembed.embeddings.compared import METRICS, WHICH

    parser.add_argument("folder", type=Path, metavar="CKPT", help="folder of checkpoints, of one checkpoint, or of a run")
    parser.add_argument("--table", required=True, metavar="NAME", help="the table, or the end of its name")
    parser.add_argument(
        "--id",
        nargs="+",
        action="extend",
        required=True,
        metavar="ID",
        help="rows to find neighbours of: names as the run's data have them, numbers, or texts of which the se.hash64 are ids",
    )
    parser.add_argument("--k", type=int, default=10, metavar="K", help="how many neighbours of each (default 10)")
    parser.add_argument("--metric", choices=METRICS, help="default: the model's, or cosine where that is not known")
    parser.add_argument("--vectors", choices=WHICH, help=VECTORS)
    parser.add_argument(
        "--names",
        type=Path,
        metavar="FILE",
        help="names of rows, one a line: line 1 names id 0; or a folder of se.Names (default: those of the run)",
    )
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: a run's best, or the newest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Find them; returns the exit code."""
    from shardembed.cli.tables import folded
    from shardembed.config.console import console_for
    from shardembed.embeddings.names import names_of
    from shardembed.embeddings.nearest import metric_of, nearest_of

    if arguments.k < 1:
        raise ConfigError(f"--k {arguments.k}: at least one neighbour must be asked for")
    with ExitStack() as opened:
        table = _table_of(arguments, opened)
        metric = metric_of(table, arguments.metric)
        book = _of_run(arguments, table.name)
        words = list(dict.fromkeys(arguments.id))
        known = table.ids.numpy() if table.ids is not None else None
        asked = list(dict.fromkeys(map(id_of, words) if book is None else book.rows_of(words, known)))
        found = nearest_of(table, asked, arguments.k, metric)
    rows = list(dict.fromkeys(each for near in found for each in (near.id, *near.ids)))
    names: dict[int, str] = {}
    if arguments.names is not None:
        names = names_of(arguments.names, rows)
    elif book is not None:
        names = book.of_rows(rows)
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


def _table_of(arguments: argparse.Namespace, opened: ExitStack) -> StoredTable | MadeRows:
    """The rows that are compared. Where the model adds features to them, which only a run's data say, they come from the run."""
    from shardembed.embeddings.stored import StoredTables
    from shardembed.recipes.run_folder import is_run

    stored = opened.enter_context(StoredTables(checkpoint_in(arguments.folder, arguments.step), arguments.step))
    rows = stored.find(arguments.table)
    described = rows.compared is not None and rows.compared.features
    if not described or arguments.vectors == "rows" or not is_run(arguments.folder):
        return stored.as_compared(rows, arguments.vectors)
    from shardembed.recipes.use.opened import open_checkpoint
    from shardembed.recipes.use.vectors import MadeRows, vectors_of

    side = rows.name.rpartition(".")[2]
    return MadeRows(side, vectors_of(open_checkpoint(arguments.folder, stored.manifest.step), side))


def _of_run(arguments: argparse.Namespace, table: str) -> RowNames | None:
    """The names that the run has kept, where no others are given."""
    from shardembed.recipes.run_folder import run_of

    if arguments.names is not None or run_of(arguments.folder) is None:
        return None
    from shardembed.recipes.use.row_names import RowNames

    return RowNames.of(arguments.folder, table)


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
