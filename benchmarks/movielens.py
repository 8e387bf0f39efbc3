"""Two towers and SASRec on MovieLens 100k, beside RecBole's BPR and SASRec on the same interactions, held out by the same rules.

    python -m benchmarks.movielens [--data FOLDER] [--recbole] [--seeds 0 1 2] [--only two_tower] [--markdown PATH]

`FOLDER` has `ml-100k.inter`, `.item` and `.user`, as the wheel `recbole` ships them; by default the one of a RecBole that is
installed. `--recbole` trains its models too, each in a process of its own, with its default settings; of BPR on the very split that
the two towers get, seed by seed, through files that say what is for training, validation and the test.

Both train on the first part, choose their best epoch by the second, and are compared on the third, all items ranked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyarrow import csv, parquet

import shardembed as se
from benchmarks import pages
from shardembed.recipes.config import Config, load
from shardembed.recipes.data.choose import open_numbered
from shardembed.recipes.data.held import labels
from shardembed.recipes.data.source import all_chunks, concatenate
from shardembed.recipes.data.stream import hash_rows
from shardembed.recipes.split_config import RankingSplitConfig

MODULE = "benchmarks.movielens"
ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "train"
NAME, KINDS, K = "ml-100k", ("inter", "item", "user"), 10
SPLIT = RankingSplitConfig(kind="ratio", share=0.1, validation=True)
SPLIT_NAME = "movielens"  # RecBole takes its own files for what is called ml-100k
PARTS = ("train", "valid", "test")
GET = "pip download recbole==1.2.1 --no-deps, unpack the wheel, and give its recbole/dataset_example/ml-100k as --data"


@dataclass(frozen=True)
class Contender:
    """A model and how it is trained.

    Attributes:
        name: in the page.
        against: the kind of evaluation that it takes part in: "ratio" or "last".
        config: a file of ours; None: RecBole's.
        model: what it is called there.
    """

    name: str
    against: str
    config: str | None = None
    model: str = ""


CONTENDERS = (
    Contender("two towers", "ratio", "movielens.yaml"),
    Contender("two towers, features", "ratio", "movielens-features.yaml"),
    Contender("RecBole 1.2.1: BPR", "ratio", model="BPR"),
    Contender("SASRec", "last", "movielens-sasrec.yaml"),
    Contender("RecBole 1.2.1: SASRec", "last", model="SASRec"),
)


def folder_of(given: Path | None) -> Path:
    """Where the data are. Ends the program where they are not."""
    found = importlib.util.find_spec("recbole") if given is None else None
    folder = (given and given.absolute()) or (
        Path(str(found.origin)).parent / "dataset_example" / NAME if found is not None else None
    )
    if folder is None or not (folder / f"{NAME}.inter").is_file():
        sys.exit(f"{MODULE}: no {NAME}.inter {'is installed' if folder is None else f'in {folder}'}: {GET}")
    return folder


def table_of(path: Path) -> pa.Table:
    """A file of RecBole's, whose names of columns hold their types too."""
    read = csv.read_csv(path, parse_options=csv.ParseOptions(delimiter="\t", quote_char=False))
    return read.rename_columns([name.partition(":")[0] for name in read.column_names])


def prepared(data: Path, into: Path) -> dict[str, str]:
    """The three files as Parquet; their paths by kind."""
    paths = {kind: str(into / f"{kind}.parquet") for kind in KINDS}
    for kind, path in paths.items():
        parquet.write_table(table_of(data / f"{NAME}.{kind}"), path)
    return paths


def ours(contender: Contender, paths: dict[str, str], seed: int, into: Path) -> dict[str, float]:
    """What a configuration of ours reaches."""
    config = CONFIGS / str(contender.config)
    settings = [f"data.path={paths['inter']}", f"data.holdout_seed={seed}", f"train.seed={seed}", f"run_dir={into}"]
    if "features" in contender.name:
        settings += [f"data.items={paths['item']}", f"data.users={paths['user']}"]
    metrics = se.train(load(config, settings)).metrics
    return {name: metrics[f"{name}@{K}"] for name in ("recall", "ndcg", "popularity_recall", "popularity_ndcg")}


def write_split(data: Path, paths: dict[str, str], seed: int, into: Path) -> None:
    """The interactions as RecBole reads them, in a file a part: those that the two towers have with this seed."""
    config = load(CONFIGS / "movielens.yaml", [f"data.path={paths['inter']}"])
    assert isinstance(config, Config)
    whole = concatenate(list(all_chunks(open_numbered(config.data)[0])))
    found = labels(whole.users, [hash_rows(seed, 0, len(whole))], SPLIT, NAME)
    head, *rows = (data / f"{NAME}.inter").read_text().splitlines()
    (into / SPLIT_NAME).mkdir(parents=True, exist_ok=True)
    for label, part in enumerate(PARTS):
        kept = [rows[row] for row in np.flatnonzero(found == label)]
        (into / SPLIT_NAME / f"{SPLIT_NAME}.{part}.inter").write_text("\n".join([head, *kept]) + "\n")


def theirs(contender: Contender, data: Path, paths: dict[str, str], seed: int, into: Path) -> dict[str, float]:
    """What RecBole's model reaches with its defaults, in a process of its own."""
    files = into / f"split-{seed}"
    if contender.against == "ratio":
        write_split(data, paths, seed, files)
        where, name = files, SPLIT_NAME
    else:
        where, name = data.parent, NAME
    command = [sys.executable, "-m", "benchmarks.movielens_recbole", contender.model, str(where), name, str(into), str(seed)]
    found = os.pathsep.join([str(ROOT), *map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))])
    env = {**os.environ, **LARGE_ARRAYS, "PYTHONPATH": found}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, cwd=into)  # where RecBole leaves logs of its own
    if done.returncode:
        sys.exit(f"{MODULE}: {' '.join(command)}")
    return json.loads(done.stdout.splitlines()[-1])


# glibc would give arrays of a hundred MB back to the system after every operation, for which RecBole's SASRec would wait.
LARGE_ARRAYS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


def measured(chosen: Iterable[Contender], data: Path, seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder)
        paths = prepared(data, into)
        for contender in chosen:
            for seed in seeds:
                began = time.perf_counter()
                one = ours(contender, paths, seed, into) if contender.config else theirs(contender, data, paths, seed, into)
                found.setdefault(contender.name, []).append(one)
                said = f"recall@{K} {one['recall']:.4f}, NDCG@{K} {one['ndcg']:.4f}"
                print(f"seed {seed}: {contender.name}: {said} in {time.perf_counter() - began:.0f} s", flush=True)
    return found


def page(found: dict[str, list[dict[str, float]]], seeds: Sequence[int]) -> list[str]:
    lines = pages.heading("MovieLens 100k", MODULE)
    lines += pages.paragraph(
        "100,000 interactions of 943 users with 1,682 items, as the wheel of RecBole ships them; no user takes an item twice.",
        "Held out are, as in RecBole, `RS: [0.8, 0.1, 0.1]` of each user's in random order (`data.split: {kind: ratio,",
        "share: 0.1, validation: true}`), or `LS: valid_and_test` by time (`{kind: last, validation: true}`). Every model is",
        "trained on the first part, keeps its best weights by the second, and is asked for the third, all items ranked but those",
        "that the user had met (SASRec's: all). RecBole's models have its default settings; BPR has the same three parts as the",
        "two towers, row for row. Ours have the settings of `configs/train/movielens*.yaml`, which were chosen by validation.",
        f"Means of {len(seeds)} seeds of split and training, in brackets the standard deviation.",
    )
    for against, title in (("ratio", "80, 10 and 10 % of each user"), ("last", "the last of each user")):
        rows = [_row(one.name, found[one.name]) for one in CONTENDERS if one.against == against and one.name in found]
        own = next((found[one.name] for one in CONTENDERS if one.against == against and one.config and one.name in found), None)
        if own is not None:
            rows.append(
                _row("what is popular", [{"recall": run["popularity_recall"], "ndcg": run["popularity_ndcg"]} for run in own])
            )
        if rows:
            lines += [f"## {title[0].upper()}{title[1:]}", "", *pages.table(["", f"recall@{K}", f"NDCG@{K}"], rows), ""]
    return lines


def _row(name: str, runs: list[dict[str, float]]) -> list[str]:
    figures = {what: [run[what] for run in runs] for what in ("recall", "ndcg")}
    return [name, *(f"{np.mean(values):.4f} ({np.std(values):.4f})" for values in figures.values())]


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__, formatter_class=form)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="with ml-100k.inter")
    parser.add_argument("--recbole", action="store_true", help="train RecBole's models too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose names hold it")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the page there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [one for one in CONTENDERS if options.only in one.name and (one.config or options.recbole)]
    lines = page(measured(chosen, folder_of(options.data), options.seeds), options.seeds)
    print("\n".join(lines))
    if options.markdown is not None:
        options.markdown.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
