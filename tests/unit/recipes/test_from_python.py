"""The training job as a function: what it takes, what it gives back, and how it leaves the process."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import shardembed as se
from shardembed.errors import ConfigError
from shardembed.recipes import config

JOB: dict[str, Any] = {
    "data": {"generator": {"users": 60, "items": 40, "interactions": 900, "tastes": 4}},
    "model": {"embedding_dim": 4, "negatives": 8},
    "train": {"epochs": 2, "global_batch_size": 100},
    "eval": {"k": 5, "every_steps": 3},
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return {**copy.deepcopy(JOB), "run_dir": str(tmp_path / "runs")}


def test_a_run_tells_what_its_folder_has(job: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = se.train(job, quiet=True)
    assert capsys.readouterr().out == ""
    summary = json.loads((run.folder / "summary.json").read_text())
    assert run.summary == summary
    assert run.metrics == {name: summary[name] for name in run.metrics}
    assert run.page is not None
    assert run.page.is_file()
    assert [line["step"] for line in run.losses] == list(range(1, summary["steps"] + 1))
    assert [line["loss"] for line in run.losses][: len(summary["losses"])] == summary["losses"]
    assert [line["step"] for line in run.history] == [3, 6, 9, summary["steps"]]
    assert {"step": summary["best_step"], **run.metrics} in run.history
    assert run.tables.rows("item", torch.arange(3)).shape == (3, 4)


def test_a_sweep_is_a_loop(job: dict[str, Any]) -> None:
    """Each run is one of its own, and the same settings give the same numbers, whatever was trained in between."""
    before = copy.deepcopy(job)
    runs = [se.train(job, settings={"optimizer.tables.lr": lr}, quiet=True) for lr in (np.float64(0.05), 0.5, 0.05)]
    assert job == before
    assert len({run.folder for run in runs}) == 3
    assert runs[0].losses == runs[2].losses != runs[1].losses
    assert runs[0].metrics == runs[2].metrics


def test_random_generators_are_as_they_were(job: dict[str, Any]) -> None:
    drawn = []
    for trains in (False, True):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        if trains:
            se.train(job, quiet=True)
        drawn.append((torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()))
    assert drawn[0] == drawn[1]


def test_an_unfinished_run_is_gone_on_with(job: dict[str, Any]) -> None:
    job["checkpoint"] = {"every_steps": 4}
    whole = se.train(job, quiet=True)
    (whole.folder / "summary.json").unlink()  # as if it had ended before
    assert se.train(job, quiet=True).folder == whole.folder
    (whole.folder / "summary.json").unlink()
    assert se.train(job, quiet=True, fresh=True).folder != whole.folder


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"train": {"epoch": 3}}, r"^config\['train'\]\['epoch'\]: unknown key 'epoch' in train; did you mean 'epochs'\?"),
        ({"train": {"epochs": "3"}}, r"^config\['train'\]\['epochs'\]: train.epochs should be a valid integer, not '3'"),
        ({"data": {"path": ["a.csv", 3]}}, r"^config\['data'\]\['path'\]\[1\]: data.path.1 should be a valid string, not 3"),
        ({"data": {"path": {"a.csv"}}}, r"^config\['data'\]\['path'\]: \{'a.csv'\} is a set, and no setting is one"),
        (
            {"data": {"path": pa.table({"user": [1]})}},
            r"^config\['data'\]\['path'\]: a Table is no setting; write it to a .parquet",
        ),
        ({"train": {3: 1}}, r"^config\['train'\]: a key must be a text, not 3"),
        ({"model": {"kind": "dlmr"}}, r"^config\['model'\]\['kind'\]: model.kind: 'dlmr' is not one of .*did you mean 'dlrm'"),
    ],
)
def test_mistakes_are_told_with_their_place(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        se.train(wrong)


def test_what_holds_itself_is_too_deep() -> None:
    wrong: dict[str, Any] = {}
    wrong["data"] = wrong
    with pytest.raises(ConfigError, match="nested deeper than 16 levels"):
        se.train(wrong)


def test_settings_go_by_their_dotted_names(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("train: {epochs: 3}\n")
    found = config.given(path, {"train.epochs": 5, "train.schedule.decay": "cosine", "run_dir": tmp_path})
    assert (found.train.epochs, found.train.schedule.decay, found.run_dir) == (5, "cosine", str(tmp_path))
    assert found.name == "mine"
    with pytest.raises(ConfigError, match=r"^settings\['train.epochs'\]: train.epochs should be a valid integer"):
        config.given(path, {"train.epochs": 1.5})
    with pytest.raises(ConfigError, match=r"^settings\['train.epochs.more'\]: train.epochs is the single value 3"):
        config.given(path, {"train.epochs.more": 1})
    with pytest.raises(ConfigError, match="a configuration that is ready takes no further ones"):
        config.given(found, {"train.epochs": 1})
    assert config.given(found) is found


def test_names_of_what_comes_along_are_taken_and_others_refused() -> None:
    with pytest.raises(ConfigError, match="neither a file nor one of"):
        se.train("quikstart")
    with pytest.raises(ConfigError, match="a file, a dict or a configuration is wanted, not 3"):
        se.train(3)  # type: ignore[arg-type]
