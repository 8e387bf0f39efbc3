"""Reading a log of interactions beside pyarrow's own reader, and what `train` does with it before its first step.

Files are made up: users, items and times as integers, and as UUIDs, names and ISO dates. All turns of a round follow each other, so
that what troubles one troubles all; files are in the page cache. pyarrow infers the types of columns, by all its threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

import shardembed as se
from benchmarks.figures import ratio, spread
from benchmarks.pages import heading, paragraph, table
from shardembed.comm.comm import Comm
from shardembed.recipes.config import Config, DataConfig
from shardembed.recipes.data.naming import keep_names
from shardembed.recipes.data.opened import open_files
from shardembed.recipes.data.wanted import Wanted
from shardembed.recipes.tasks import prepare

WANTED = [
    Wanted("user_id", "key", "data.user"),
    Wanted("item_id", "key", "data.item"),
    Wanted("timestamp", "time", "data.time"),
]
Taken = tuple[float, float]  # seconds by the clock, and of processors


def make(folder: Path, rows: int) -> None:
    """ints.csv, ints.parquet, texts.csv and texts.parquet."""
    draw = np.random.default_rng(0)
    users, items = draw.integers(0, rows // 10, rows), np.minimum(draw.zipf(1.2, rows), rows // 40)
    times = 1_700_000_000 + np.sort(draw.integers(0, 10**7, rows))
    ints = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    uuids = pa.array([f"{user * 2654435761 % 2**32:08x}-aaaa-4bbb-8ccc-{user:012x}" for user in users.tolist()])
    names = pa.array([f"SKU-{item}" for item in items.tolist()])
    dates = pa.array(np.char.add(np.datetime_as_string(times.astype("datetime64[s]")), "Z"))
    texts = pa.table({"user_id": uuids, "item_id": names, "timestamp": dates})
    for kind, written in (("ints", ints), ("texts", texts)):
        csv.write_csv(written, folder / f"{kind}.csv", csv.WriteOptions(quoting_style="none"))
        parquet.write_table(written, folder / f"{kind}.parquet")


def read(path: Path) -> None:
    files = open_files([str(path)], WANTED, False, "data.path")
    for part in range(len(files.parts)):
        for _ in files.chunks(part):
            pass


def turns(path: Path, folder: Path) -> dict[str, Callable[[], object]]:
    """What is measured of a file, pyarrow's reader first."""
    config = Config(name="reading", data=DataConfig(path=(str(path),)))

    def names() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as kept:
            keep_names(config.data, Path(kept), 0, 1)

    theirs: Callable[[], object] = (lambda: csv.read_csv(path)) if path.suffix == ".csv" else (lambda: parquet.read_table(path))
    return {"pyarrow": theirs, "read": lambda: read(path), "prepare": lambda: prepare(config, Comm.of()), "names": names}


def measure(paths: list[Path], rounds: int, folder: Path) -> dict[str, dict[str, list[Taken]]]:
    """By file and by what was done, a figure a round; the first round, which is left out, compiles kernels."""
    found: dict[str, dict[str, list[Taken]]] = {path.name: {} for path in paths}
    for number in range(-1, rounds):
        for path in paths:
            for name, turn in turns(path, folder).items():
                began, used = time.perf_counter(), time.process_time()
                turn()
                if number >= 0:
                    taken = (time.perf_counter() - began, time.process_time() - used)
                    found[path.name].setdefault(name, []).append(taken)
    return found


def page(found: dict[str, dict[str, list[Taken]]], rows: int) -> str:
    head = ["", "pyarrow", "read", "of pyarrow's", "train's preparation", "names"]
    lines = heading("Reading logs", "benchmarks.reading")
    lines += paragraph(f"{rows:,} interactions with a time.", *(__doc__ or "").split("\n\n", 1)[1].split("\n"))
    for place, what in enumerate(("Seconds by the clock", "Seconds of processors")):
        lines += [f"## {what}", ""]
        cells = []
        for name, by_turn in found.items():
            seconds = {turn: [one[place] for one in taken] for turn, taken in by_turn.items()}
            median = {turn: f"{spread(taken).median:.2f}" for turn, taken in seconds.items()}
            times = f"{ratio(seconds['read'], seconds['pyarrow']).median:.2f}x"
            cells.append([name, median["pyarrow"], median["read"], times, median["prepare"], median["names"]])
        lines += [*table(head, cells), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", help="write the page here")
    arguments = parser.parse_args()
    se.hash64(pa.array(["compiled"]))
    with tempfile.TemporaryDirectory(prefix="reading-") as name:
        folder = Path(name)
        make(folder, arguments.rows)
        paths = [folder / f"{kind}{suffix}" for kind in ("ints", "texts") for suffix in (".csv", ".parquet")]
        text = page(measure(paths, arguments.rounds, folder), arguments.rows)
    print(text)
    if arguments.markdown:
        Path(arguments.markdown).write_text(text)


if __name__ == "__main__":
    main()
