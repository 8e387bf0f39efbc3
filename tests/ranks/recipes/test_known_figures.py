"""Configurations whose data are made up reach what the model that made them knows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from shardembed.recipes import config, train


def summary_of(folder: Path, name: str, *sets: str) -> dict[str, Any]:
    path = Path(__file__).parents[3] / "configs" / "train" / f"{name}.yaml"
    words = [f"run_dir={folder / 'runs'}", "log.page=false", "checkpoint.every_steps=null", *sets]
    return train.run(config.load(path, words), Console(file=io.StringIO()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
def test_clicks_in_the_criteo_layout(tmp_path: Path, seed: int) -> None:
    found = summary_of(tmp_path, "dlrm-criteo", f"data.generator.seed={seed}", f"train.seed={seed}")
    assert found["generator_auc"] > 0.8
    assert found["auc"] > found["generator_auc"] - 0.01
    assert found["auc"] > found["logistic_auc"] + 0.05


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["planted", "sasrec"])
def test_recommendations(tmp_path: Path, name: str) -> None:
    found = summary_of(tmp_path, name)
    known = {metric.removeprefix("generator_"): value for metric, value in found.items() if metric.startswith("generator_")}
    assert len(known) == 2
    for metric, value in known.items():
        assert found[metric] > 0.95 * value
        assert value > 3 * found[f"popularity_{metric}"]
