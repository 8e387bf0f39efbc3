"""`shardembed convert SOURCE --out DIR --trusted`: a checkpoint of TorchRec or of torch itself, as one of ours."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = "a folder of torch.distributed.checkpoint, or a file of torch.save with a state dict"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=source)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder of checkpoints to write into")
    parser.add_argument("--trusted", action="store_true", help="you trust the source: reading it unpickles, which can run any code")
    parser.add_argument("--prefix", default="", metavar="TEXT", help="only keys that begin so, without it; such as 'model.'")
    parser.add_argument("--table", action="append", default=[], metavar="NAME", help="keys or patterns that are tables too")
    parser.add_argument("--step", type=int, default=0, metavar="N", help="step of the checkpoint (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object; all else goes to stderr")


def run(arguments: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    from shardembed.checkpoint.foreign import convert_checkpoint
    from shardembed.config.console import console_for
    from shardembed.planner import words

    done = convert_checkpoint(
        arguments.source,
        arguments.out,
        trusted=arguments.trusted,
        prefix=arguments.prefix,
        tables=arguments.table,
        step=arguments.step,
    )
    console = console_for(sys.stderr if arguments.json else sys.stdout)
    console.print(f"wrote {done.path}", soft_wrap=True)
    tables, others = words.plural(len(done.tables), "table"), words.plural(len(done.dense), "other tensor")
    console.print(f"{tables}, {others}; load with weights_only=True")
    for key, why in list(done.left_out.items())[:SHOWN]:
        console.print(f"left out: {key!r} {why}", soft_wrap=True)
    if len(done.left_out) > SHOWN:
        console.print(f"and {len(done.left_out) - SHOWN} more left out")
    if arguments.json:
        found = {"path": str(done.path), "tables": done.tables, "dense": done.dense, "left_out": done.left_out}
        print(json.dumps(found), flush=True)
    return 0
