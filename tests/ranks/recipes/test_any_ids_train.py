"""Jobs whose ids are texts and hashes of 64 bits, from YAML to the end, on any number of ranks."""

from __future__ import annotations

import csv
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from rich.console import Console

import shardembed as se
from shardembed.inputs.hash64 import hash64
from shardembed.recipes import config, recorded, run_page, series, train
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.unit.pages import stands_alone

RNG = np.random.default_rng(5)
USERS, SKUS = RNG.integers(60, size=900), RNG.integers(40, size=900) * RNG.integers(2, size=900)  # some items are popular
TWO_TOWERS = """
data:
  path: {folder}/views.csv
  user: viewer
  item: sku
  ids: {{kind: dynamic, capacity: 50, tables: {{item: 30}}, eviction: lru, admission: {{kind: min_count, count: 2}}}}
model: {{embedding_dim: 4, negatives: 16, towers: {towers}}}
train: {{epochs: 2, global_batch_size: 100}}
plan: {{user: row_wise, item: column_wise}}
checkpoint: {{every_steps: 4}}
eval: {{k: 5}}
run_dir: {folder}/runs
"""
SEQUENCES = """
data: {{path: {folder}/views.csv, user: viewer, item: sku, time: null, ids: {{kind: dynamic, eviction: {{kind: ttl, steps: 3}}}}}}
model: {{kind: sasrec, embedding_dim: 4, negatives: 16, max_length: 8, layers: 1}}
train: {{epochs: 2, global_batch_size: 20}}
plan: row_wise
eval: {{k: 5}}
run_dir: {folder}/runs
"""
CLICKS = """
data:
  path: {folder}/clicks.parquet
  integers: [I1]
  categories: [C1, C2]
  ids: {{kind: dynamic, capacity: 25, eviction: {{kind: lfu, halve_every: 4}}, unknown: zeros}}
model: {{kind: dcnv2, embedding_dim: 4}}
train: {{epochs: 2, global_batch_size: 100}}
plan: row_wise
run_dir: {folder}/runs
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with (tmp_path / "views.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["viewer", "sku"])
        rows.writerows((f"ü-{user}", f"SKU/{sku:03}") for user, sku in zip(USERS, SKUS, strict=True))
    labels = (USERS + SKUS) % 3 == 0
    columns = [labels, RNG.integers(9, size=900), [f"shop {user}" if user else None for user in USERS], SKUS + 2**62]
    parquet.write_table(pa.table(columns, names=["label", "I1", "C1", "C2"]), tmp_path / "clicks.parquet")
    return tmp_path


def trained(rank: int, world_size: int, job: str, options: tuple[str, ...] = ()) -> dict[str, Any]:
    return train.run(config.load(job, options), Console(file=io.StringIO()))


def job_of(folder: Path, text: str, **settings: object) -> str:
    path = folder / "job.yaml"
    path.write_text(text.format(folder=folder, **settings))
    return str(path)


@pytest.mark.parametrize(
    ("text", "settings", "score"),
    [
        (TWO_TOWERS, {"towers": "[]"}, "recall@5"),
        exhaustive(TWO_TOWERS, {"towers": "[6]"}, "recall@5"),
        (SEQUENCES, {}, "recall@5"),
        (CLICKS, {}, "auc"),
    ],
    ids=["two_tower", "towers", "sasrec", "dcnv2"],
)
def test_losses_do_not_depend_on_the_number_of_ranks(folder: Path, text: str, settings: dict[str, str], score: str) -> None:
    job = job_of(folder, text, **settings)
    alone, *others = (run_ranks(ranks, trained, job)[0] for ranks in (1, 2))
    assert alone["losses"][-1] < alone["losses"][0]
    for summary in others:
        assert summary["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert summary[score] == pytest.approx(alone[score], rel=2e-2)


def test_names_of_a_run_say_what_its_ids_are(folder: Path) -> None:
    summary = run_ranks(2, trained, job_of(folder, TWO_TOWERS, towers="[]"), ("train.max_steps=1",))[0]
    names = Path(summary["run_dir"]) / "names"
    skus = sorted({f"SKU/{sku:03}" for sku in SKUS})
    assert se.Names(names / "item").texts() == dict(zip(hash64(skus).tolist(), skus, strict=True))
    assert len(se.Names(names / "user").texts()) == len(set(USERS))


def test_an_interrupted_run_goes_on_with_the_ids_that_lived(folder: Path) -> None:
    job = job_of(folder, TWO_TOWERS, towers="[]")
    whole = run_ranks(1, trained, job)[0]
    run = Path(whole["run_dir"])
    (run / "summary.json").unlink()  # as if it had ended before
    newest = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    resumed = run_ranks(2, trained, job)[0]
    assert resumed["run_dir"] == whole["run_dir"]
    for name in ("recall@5", "ndcg@5", "steps"):
        assert resumed[name] == pytest.approx(whole[name], rel=2e-2), name
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-4)


def test_the_page_tells_what_became_of_ids(folder: Path) -> None:
    """Held against what each table says of itself at the end."""
    summary = run_ranks(2, trained, job_of(folder, TWO_TOWERS, towers="[]"))[0]
    run = recorded.read(Path(summary["run_dir"]))
    assert set(run.curves.ids) == {"user", "item"}
    for name, lines in run.curves.ids.items():
        totals = run.curves.totals[name]
        assert totals["live"] == totals["created"] - totals["evicted"] == lines["live"].points[-1].mean
        assert sum(
            point.mean * every for point, every in zip(lines["created"].points, steps_of(lines["created"]), strict=True)
        ) == (pytest.approx(totals["created"]))
        assert totals["waiting"] > 0
    assert run.curves.totals["user"]["evicted"] > 0
    assert run.curves.totals["user"]["unknown"] > 0, "of 60 users, 50 may live"
    text = run_page.render(run)
    stands_alone(text)
    assert "user: ids a step" in text
    assert f"<td>{run.curves.totals['user']['created']:,}</td>" in re.sub(r"<td [^>]*>", "<td>", text)


def steps_of(line: series.Series) -> list[int]:
    """Between its points."""
    steps = [0, *(point.step for point in line.points)]
    return [after - before for before, after in pairwise(steps)]
