"""Clicks with any columns train to the same numbers on any number of ranks, and a run's folder is enough to score rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv
from rich.console import Console

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.inputs.hash64 import hash64
from shardembed.recipes import train
from shardembed.recipes.click_task import CtrTask
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.ctr_evaluate import predicted
from shardembed.recipes.tasks import prepare
from shardembed.recipes.use.opened import open_checkpoint
from tests.amount import exhaustive
from tests.harness import run_ranks

ROWS = 900
RNG = np.random.default_rng(5)
SHOP, PRICE = RNG.integers(30, size=ROWS), RNG.normal(1000, 50, ROWS)
TAGS = [RNG.integers(9, size=count).tolist() for count in RNG.integers(4, size=ROWS)]


def config(folder: Path, **sections: Any) -> CtrConfig:
    labels = ((SHOP % 3 == 0) ^ (PRICE > 1000) ^ (RNG.random(ROWS) < 0.1)).astype(int)
    columns = {
        "clicked": labels,
        "shop": [f"shop {shop}" if shop else None for shop in SHOP],
        "price": PRICE,
        "tags": ["|".join(f"t{tag}" for tag in tags) for tags in TAGS],
        "day": RNG.integers(20, size=ROWS),
        "hour": RNG.integers(24, size=ROWS),
    }
    for part in range(2):
        csv.write_csv(pa.table(columns)[part * 450 : part * 450 + 450], folder / f"clicks-{part}.csv")
    features = (
        {"name": "shop", "kind": "id"},
        {"name": "tags", "kind": "ids", "separator": "|"},
        {"name": "price", "kind": "number", "scale": "raw"},
        {"name": "hour", "kind": "number", "buckets": (6.0, 12.0, 18.0)},
        {"name": "clicked", "kind": "label"},
        {"name": "day", "kind": "time"},
    )
    values: dict[str, Any] = {
        "name": "test",
        "data": {"path": (str(folder / "clicks-*.csv"),), "features": features, "split": {"kind": "time", "fraction": 0.2}},
        "model": {"embedding_dim": 4, "bottom": (8,), "top": (8,), "dropout": 0.1},
        "optimizer": {"dense": {"lr": 0.01, "weight_decay": 0.001}},
        "train": {"global_batch_size": 65, "epochs": 2},
        "log": {"page": False},
        "run_dir": str(folder / "runs"),
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    return CtrConfig.model_validate(values)


def summary_of(rank: int, world_size: int, settings: CtrConfig) -> dict[str, Any]:
    return train.run(settings, Console(file=io.StringIO()))


HASHED = {"kind": "hash", "num_embeddings": 50}
WIDE = {"kind": "wide", "embedding_dim": 16, "bottom": (64,), "top": (64, 32), "dropout": 0.0}


@pytest.mark.parametrize(
    "sections",
    [
        {},
        exhaustive({"model": WIDE, "data": {"ids": {"kind": "vocabulary"}}}),
        exhaustive(
            {
                "model": {"kind": "dcnv2", "cross_layers": 2},
                "data": {
                    "ids": {"kind": "hash", "num_embeddings": 50},
                },
            }
        ),
    ],
)
def test_metrics_do_not_depend_on_the_number_of_ranks(tmp_path: Path, sections: dict[str, Any]) -> None:
    settings = config(tmp_path, **sections)
    alone = run_ranks(1, summary_of, settings)[0]
    for ranks in (2, 3):
        for summary in run_ranks(ranks, summary_of, settings):
            assert summary["losses"] == pytest.approx(alone["losses"], abs=1e-4)
            assert (summary["evaluated_rows"], summary["steps"]) == (alone["evaluated_rows"], alone["steps"])
            assert summary["auc"] == pytest.approx(alone["auc"], abs=1e-3)


def scored(rank: int, world_size: int, settings: CtrConfig, run: Path, files: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds of this rank's rows for validation by its number, and of all rows of files without labels that rank 0 reads."""
    task = prepare(settings, Comm.of())
    assert isinstance(task, CtrTask)
    scorer = open_checkpoint(run).scorer
    assert scorer is not None
    trained = task.build()
    se.load_checkpoint(scorer.checkpoint, trained.wrapped, weights_only=True)
    mine = [found for _, found in predicted(trained, task.data, 64)]
    chunks = [chunk for part in range(len(files)) for chunk in scorer.open(files).chunks(part)]
    return np.concatenate(mine), np.concatenate([scorer.logits(chunk[: None if rank == 0 else 0]) for chunk in chunks])


def ids_of(rank: int, world_size: int, run: Path, file: str) -> dict[str, list[int]]:
    """What the first row of a file has."""
    scorer = open_checkpoint(run).scorer
    assert scorer is not None
    (chunk, *_) = scorer.open((file,)).chunks(0)
    return {"shop": chunk.ids[0].tolist(), "tags": chunk.lists[0].values[:2].tolist()}


@pytest.mark.parametrize("sections", [{}, exhaustive({"model": WIDE, "data": {"ids": {"kind": "vocabulary"}}})])
def test_a_runs_folder_is_enough_to_score_rows_without_labels(tmp_path: Path, sections: dict[str, Any]) -> None:
    settings = config(tmp_path, **sections)
    run = Path(run_ranks(1, summary_of, settings)[0]["run_dir"])
    days = []
    for part in range(2):
        table = csv.read_csv(tmp_path / f"clicks-{part}.csv")
        days += table["day"].to_pylist()
        table = table.drop_columns(["clicked", "day"])
        csv.write_csv(table, tmp_path / f"new-{part}.csv")
        # Only texts of digits: a file that says nothing of whether they are texts.
        digits = pa.array(["17"] * len(table)), pa.array(["17|4"] * len(table))
        for name, column in zip(("shop", "tags"), digits, strict=True):
            table = table.set_column(table.column_names.index(name), name, column)
        csv.write_csv(table, tmp_path / f"digits-{part}.csv", csv.WriteOptions(quoting_style="none"))
    files = tuple(str(tmp_path / f"new-{part}.csv") for part in range(2))
    (validation, every), (_, nothing) = run_ranks(2, scored, settings, run, files)
    assert len(nothing) == 0
    assert len(every) == ROWS
    latest = np.sort(days)[::-1][round(0.2 * ROWS) - 1]
    held = every[np.array(days) >= latest]
    # Rank 0 has the first half of each batch of 64.
    starts = range(0, len(held), 64)
    found, wanted = run_ranks(1, ids_of, run, str(tmp_path / "digits-0.csv"))[0], hash64(["17", "4"]).tolist()
    assert found == {"shop": [wanted[0]], "tags": wanted}
    expected = np.concatenate([held[start : start + (len(held[start : start + 64]) + 1) // 2] for start in starts])
    np.testing.assert_allclose(validation, expected, atol=1e-5)
