"""Small runs that tests of their use share, and the evaluation of a job done again in plain NumPy."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import shardembed as se
from shardembed.recipes import config, train
from shardembed.recipes.tasks import prepare

VIEWS = "data: {{path: {folder}/views.csv, user: viewer, item: sku{more}}}\n"
TWO_TOWER = "model: {{embedding_dim: 8, negatives: 32, towers: {towers}}}\ntrain: {{epochs: 3, global_batch_size: 100}}\n"
SASREC = """model: {{kind: sasrec, embedding_dim: 8, negatives: 32, max_length: 8, layers: 1}}
train: {{epochs: 3, global_batch_size: 20}}
"""
END = "eval: {{k: 10{eval}}}\nrun_dir: {folder}/runs\n"

CLICKS = """
data:
  path: {folder}/clicks.csv
  label: clicked
  features:
  - {{name: shop, kind: id}}
  - {{name: tags, kind: ids, separator: "|"}}
  - {{name: price, kind: number}}
  - {{name: hour, kind: number, buckets: [6, 12, 18]}}
model: {{kind: {kind}}}
train: {{global_batch_size: 100}}
run_dir: {folder}/runs
"""
CLICKED = [
    {
        "clicked": row % 3 == 0,
        "shop": f"shop {row % 7}" if row % 5 else None,
        "tags": "|".join(f"t{row % size}" for size in (2, 3)),
        "price": row % 11 - 5.0,
        "hour": row % 24,
        "note": f"n{row}",
    }
    for row in range(600)
]


@dataclass(frozen=True)
class Small:
    """A run: its folder, what its summary says, and the settings."""

    path: Path
    summary: dict[str, Any]
    config: Any

    @staticmethod
    def train(folder: Path, text: str, **settings: str) -> Small:
        views(folder)
        job = folder / f"job-{abs(hash((text, *settings.items())))}.yaml"
        job.write_text(text.format(folder=folder, **{"more": "", "towers": "[]", "eval": "", **settings}))
        summary = train.run(config.load(job), Console(file=io.StringIO()))
        path = Path(summary["run_dir"])
        return Small(path, json.loads((path / "summary.json").read_text()), config.load(job))


def clicks(folder: Path) -> None:
    """Write `CLICKED` as a file."""
    with (folder / "clicks.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, list(CLICKED[0]))
        rows.writeheader()
        rows.writerows({**row, "clicked": int(row["clicked"])} for row in CLICKED)


def views(folder: Path) -> list[tuple[str, str]]:
    """Views of 80 users who like one of four kinds of 60 items, some of them twice."""
    rng = np.random.default_rng(3)
    users = rng.integers(80, size=1500)
    items = np.where(rng.random(1500) < 0.2, rng.integers(60, size=1500), rng.zipf(1.5, size=1500) % 15 * 4 + users % 4)
    found = [(f"ü-{user}", f"SKU/{item:03}") for user, item in zip(users, items, strict=True)]
    with (folder / "views.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["viewer", "sku", "at", "taste", "price"])
        rows.writerows((*one, at, f"likes {users[at] % 4}", items[at] * 0.5) for at, one in enumerate(found))
    return found


@dataclass(frozen=True)
class Asked:
    """What the evaluation of a job asks: by user the items held out, and what the user had met by then; all of them ids."""

    held: dict[int, set[int]]
    met: dict[int, set[int]]


def asked_of(settings: Any) -> Asked:
    data = prepare(settings, se.init()).data
    asked = data.questions()
    users = np.arange(data.users) if data.ids is None else data.ids.users
    items = np.arange(data.items) if data.ids is None else data.ids.items
    everyone = asked.held.users
    history = asked.histories(everyone)
    held: dict[int, set[int]] = {int(users[user]): set() for user in everyone}
    met: dict[int, set[int]] = {user: set() for user in held}
    for owner, item in zip(everyone[history.owners].tolist(), history.items.tolist(), strict=True):
        met[int(users[owner])].add(int(items[item]))
    for owner, item in zip(asked.held.owners.tolist(), asked.held.items.tolist(), strict=True):
        held[int(users[owner])].add(int(items[item]))
    return Asked(held, met)


def recall_and_ndcg(asked: Asked, vectors: dict[str, tuple[np.ndarray, np.ndarray]], k: int, repeats: bool) -> tuple[float, float]:
    """By exhaustive ranking: vectors are (ids `[n]`, values `[n, D]`) of user and item."""
    item_ids, items = vectors["item"]
    queries = dict(zip(vectors["user"][0].tolist(), vectors["user"][1], strict=True))
    recalls, gains = [], []
    for user, held in asked.held.items():
        wanted = held if repeats else held - asked.met[user]
        if not wanted:
            continue
        scores = items @ queries[user]
        candidates = np.array([repeats or one not in asked.met[user] for one in item_ids.tolist()])
        best = item_ids[candidates][np.argsort(-scores[candidates], kind="stable")[:k]].tolist()
        gained = sum(1 / np.log2(place + 2) for place, item in enumerate(best) if item in wanted)
        recalls.append(len(wanted.intersection(best)) / len(wanted))
        gains.append(gained / sum(1 / np.log2(place + 2) for place in range(min(k, len(wanted)))))
    return float(np.mean(recalls)), float(np.mean(gains))
