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
@pytest.mark.parametrize(
    ("name", "least"), [("planted", {"recall@20": 0.95, "ndcg@20": 0.93}), ("sasrec", {"recall@10": 0.95, "ndcg@10": 0.95})]
)
def test_recommendations(tmp_path: Path, name: str, least: dict[str, float]) -> None:
    found = summary_of(tmp_path, name)
    for metric, share in least.items():
        assert found[metric] > share * found[f"generator_{metric}"]
        assert found[f"generator_{metric}"] > 3 * found[f"popularity_{metric}"]
