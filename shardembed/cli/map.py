"""`shardembed map CKPT --table item --out map.png`: a picture of a table, rows near each other as they are in it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from shardembed.cli.given import checkpoint_in
from shardembed.cli.ids import id_of
from shardembed.config.shown import beginning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from shardembed.cli.tables import VECTORS
    from shardembed.embeddings.compared import WHICH

    parser.add_argument("folder", type=Path, metavar="CKPT", help="folder of checkpoints, of one checkpoint, or of a run")
    parser.add_argument("--table", required=True, metavar="NAME", help="the table, or the end of its name")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a .png, .svg or .pdf file (default: the table's name and .png)")
    parser.add_argument("--sample", type=int, default=5000, metavar="N", help="how many rows are drawn (default 5000)")
    parser.add_argument(
        "--id", type=id_of, nargs="+", action="extend", default=[], metavar="ID", help="rows to draw as rings: numbers or texts"
    )
    parser.add_argument(
        "--names", type=Path, metavar="FILE", help="names of rows, one a line: line 1 names id 0; or a folder of se.Names"
    )
    parser.add_argument(
        "--metadata", type=Path, metavar="FILE", help="a .csv, .tsv or .parquet file with a line a row of the table"
    )
    parser.add_argument("--colour", metavar="COLUMN", help="the column of --metadata that colours points: categories or numbers")
    parser.add_argument(
        "--key", metavar="COLUMN", help="the column of --metadata with names (where there are --names) or ids (default: the first)"
    )
    parser.add_argument("--labels", type=int, default=30, metavar="N", help="how many rows get their name at most (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default 0)")
    parser.add_argument("--vectors", choices=WHICH, help=VECTORS)
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step (default: a run's best, or the newest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Draw; returns the exit code."""
    from shardembed.cli.tables import folded
    from shardembed.config.console import console_for
    from shardembed.embeddings import table_map
    from shardembed.planner import words

    drawn = table_map(
        checkpoint_in(arguments.folder, arguments.step),
        arguments.table,
        arguments.out or Path(f"{arguments.table.rpartition('.')[2].replace('/', '_')}.png"),
        sample=arguments.sample,
        ids=arguments.id,
        names=arguments.names,
        labels=arguments.labels,
        seed=arguments.seed,
        step=arguments.step,
        vectors=arguments.vectors,
        metadata=arguments.metadata,
        colour=arguments.colour,
        key=arguments.key,
    )
    console = console_for(sys.stderr if arguments.json else sys.stdout)
    shares = " and ".join(words.percent(share) for share in drawn.shares)
    points = f"{drawn.drawn:,} of {words.plural(drawn.rows, 'row')}, {len(drawn.named)} of them named"
    console.print(f"wrote {drawn.file}: {points}", soft_wrap=True)
    console.print(folded(drawn.told))
    console.print(f"the two components hold {shares} of the variance: what is apart")
    console.print("in the picture is apart, what is near there need not be near")
    if arguments.colour is not None:
        console.print(folded(f"{drawn.coloured:,} of {drawn.drawn:,} points coloured by {arguments.colour}{_of(drawn.legend)}"))
    if drawn.left_out:
        console.print(f"{words.plural(drawn.left_out, 'row')} with inf or nan left out")
    if arguments.json:
        print(json.dumps({**asdict(drawn), "file": str(drawn.file)}))
    return 0


def _of(legend: tuple[str, ...]) -> str:
    return f": {', '.join(beginning(each, 24) for each in legend)}" if legend else ", on a scale"
