"""The configuration of a click log that comes along reaches what the model that made the log knows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from rich.console import Console

from examples import make_clicks
from shardembed.comm.comm import Comm
from shardembed.recipes import config, train
from shardembed.recipes.ctr_metrics import auc

ROOT = Path(__file__).parents[3]


def reached(folder: Path, table: pa.Table, name: str, *sets: str) -> tuple[dict[str, Any], float]:
    """The summary of the job on the log, and the AUC of the model that made it, on the same rows."""
    path = folder / name
    make_clicks.write(table, path)
    words = [f"data.path={path}", f"run_dir={folder / 'runs'}", "log.page=false", *sets]
    summary = train.run(config.load(ROOT / "configs" / "train" / "click-log.yaml", words), Console(file=io.StringIO()))
    held = table.slice(len(table) - summary["evaluated_rows"])
    chance = held["chance"].to_numpy()
    known = np.log(chance / (1 - chance)).astype(np.float32)
    return summary, auc(known, held["clicked"].to_numpy(), Comm.of(), torch.device("cpu"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_it_reaches_what_can_be_known_of_the_clicks(tmp_path: Path, seed: int) -> None:
    summary, known = reached(tmp_path, make_clicks.make(200_000, seed), "clicks.csv", f"train.seed={seed}")
    assert 0.8 < known < 0.9
    assert summary["auc"] > known - 0.01
    assert summary["auc"] > summary["logistic_auc"] + 0.1
    assert summary["log_loss"] < summary["logistic_log_loss"] < summary["base_log_loss"]
    assert summary["calibration"] == pytest.approx(1, abs=0.05)


def test_a_small_log_is_learned_from_whatever_file_it_is_in(tmp_path: Path) -> None:
    table = make_clicks.make(6_000, 1)
    found = [reached(tmp_path, table, name, "train.global_batch_size=256")[0] for name in ("clicks.csv", "clicks.parquet")]
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["auc"] == found[1]["auc"] > found[0]["logistic_auc"]
