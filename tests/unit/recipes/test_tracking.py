"""What TensorBoard, MLflow and metrics.jsonl are told of a run: settings, steps, and the metrics at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import shardembed as se
from shardembed.errors import ConfigError
from shardembed.recipes import config, mlflow_log, tracking
from tests.unit.recipes.test_from_python import job

__all__ = ["job"]


def lines_of(run: se.TrainedRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def test_json_lines_begin_with_the_settings_and_end_with_the_metrics(job: dict[str, Any]) -> None:
    job["checkpoint"] = {"every_steps": 4}
    run = se.train(job, quiet=True)
    first, *_, last = lines_of(run)
    assert first["settings"] == tracking.flat(config.given(job))
    assert first["settings"]["train.epochs"] == 2
    assert run.metrics.items() <= last.items()
    (run.folder / "summary.json").unlink()  # as if it had ended before: the first line stays the only one of its kind
    again = lines_of(se.train(job, quiet=True))
    assert [line for line in again if "settings" in line] == [first] == again[:1]


def test_tensorboard_has_settings_and_final_metrics_in_one_run(job: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    run = se.train(job, settings={"log.tensorboard": True}, quiet=True)
    assert [path.is_dir() for path in (run.folder / "tensorboard").iterdir()] == [False], "no run beside the one with the curves"
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    assert events.Scalars("final/recall@5")[0].value == pytest.approx(run.metrics["recall@5"])
    assert len(events.Scalars("train/loss")) == run.summary["steps"]
    (text,) = events.Tensors("settings/text_summary")
    assert "| train.epochs | 2 |" in text.tensor_proto.string_val[0].decode()
    data = plugin_data_pb2.HParamsPluginData.FromString(events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert data.session_start_info.hparams["optimizer.tables.lr"].number_value == pytest.approx(0.1)


def test_mlflow_has_settings_curves_and_final_metrics(job: dict[str, Any], tmp_path: Path) -> None:
    client = mlflow_client(tmp_path)
    job["checkpoint"] = {"every_steps": 4}
    settings = {"log.mlflow": {"experiment": "sweep", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    run = se.train(job, settings=settings, quiet=True)
    (told,) = client.search_runs([client.get_experiment_by_name("sweep").experiment_id])
    assert told.info.run_name == run.folder.name
    assert told.info.status == "FINISHED"
    assert told.data.params["train.epochs"] == "2"
    assert told.data.params["model.kind"] == "two_tower"
    assert told.data.metrics["final/recall_at_5"] == pytest.approx(run.metrics["recall@5"])
    losses = client.get_metric_history(told.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in losses] == [(line["step"], line["loss"]) for line in run.losses]
    assert len(client.get_metric_history(told.info.run_id, "eval/recall_at_5")) == 3
    (run.folder / "summary.json").unlink()
    se.train(job, settings=settings, quiet=True)
    assert len(client.search_runs([told.info.experiment_id])) == 1, "a run that is resumed goes on with its own"


def test_a_store_that_fails_ends_no_training(
    job: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow_client(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/file/mlflow.db")
    run = se.train(job, settings={"log.mlflow": True})
    said = " ".join(capsys.readouterr().out.split())
    assert "is told no more of this run" in said
    assert "training goes on" in said
    assert run.summary["steps"] == len(run.losses)


def mlflow_client(tmp_path: Path) -> Any:
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    pytest.importorskip("sqlalchemy", reason="the extra mlflow is not installed")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


def test_names_and_addresses_are_made_fit_for_others() -> None:
    assert mlflow_log._name("eval/recall@20") == "eval/recall_at_20"
    assert mlflow_log._name("größe: 3") == "gr__e_ 3"
    assert mlflow_log._shown("https://me:secret@host/path") == "https://host/path"
    assert mlflow_log._shown("sqlite:///a@b.db") == "sqlite:///a@b.db"
    with pytest.raises(ConfigError, match="settings are kept with the run"):
        config.given({"log": {"mlflow": {"tracking_uri": "https://me:secret@host"}}})
    assert config.given({"log": {"mlflow": False}}).log.mlflow is None
