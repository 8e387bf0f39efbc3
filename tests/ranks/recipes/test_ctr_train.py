"""A model that predicts clicks trains to the same metrics on any number of ranks, and near to what can be reached."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyarrow import parquet
from rich.console import Console

from shardembed.comm.comm import Comm
from shardembed.errors import DataError
from shardembed.recipes import ctr_metrics, evaluation, train
from shardembed.recipes.calibration import calibration_bins
from shardembed.recipes.click_task import CtrTask
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data.clicks.rows import Clicks, concatenate
from shardembed.recipes.data.criteo.planted import PlantedClicks, write
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.tasks import prepare
from tests.amount import exhaustive
from tests.harness import run_ranks

CPU = torch.device("cpu")
METRICS = ("auc", "normalized_entropy", "log_loss", "calibration", "generator_auc")


def config(run_dir: Path, **sections: Any) -> CtrConfig:
    values = {
        "name": "test",
        "data": {
            "integers": ("I1", "I2"),
            "categories": ("C1", "C2", "C3"),
            "ids": {"num_embeddings": 100},
            "split": {"fraction": 0.2},
            "generator": {"rows": 20_000, "max_cardinality": 30},
        },
        "model": {"embedding_dim": 4, "bottom": (8,), "top": (8,)},
        "optimizer": {"dense": {"lr": 0.01}},
        "train": {"global_batch_size": 256},
        "run_dir": str(run_dir),
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return CtrConfig.model_validate(values)


def summary_of(rank: int, world_size: int, settings: CtrConfig) -> dict[str, Any]:
    return train.run(settings, Console(file=io.StringIO()))


@pytest.mark.parametrize(("kind", "worlds"), [("dcnv2", (2,)), exhaustive("dcnv2", (4,)), exhaustive("dlrm", (2, 4))])
def test_metrics_do_not_depend_on_the_number_of_ranks(tmp_path: Path, kind: str, worlds: tuple[int, ...]) -> None:
    model = {"kind": kind, "embedding_dim": 4, "bottom": (8,), "top": (8,)}
    settings = config(tmp_path, model=model, plan={"C1": "row_wise", "*": "column_wise"}, train={"global_batch_size": 257})
    alone = run_ranks(1, summary_of, settings)[0]
    for ranks in worlds:
        for summary in run_ranks(ranks, summary_of, settings):
            assert summary["losses"] == pytest.approx(alone["losses"], abs=1e-4)
            assert (summary["evaluated_rows"], summary["steps"]) == (alone["evaluated_rows"], alone["steps"])
            for name in METRICS:
                assert summary[name] == pytest.approx(alone[name], abs=1e-3), name


@pytest.mark.exhaustive
def test_dlrm_reaches_what_the_generating_model_knows(tmp_path: Path) -> None:
    schedule = {"warmup_steps": 20, "decay": "cosine"}
    rows = {"ids": {"kind": "vocabulary"}, "split": {"fraction": 0.2}, "generator": {"rows": 20_000, "max_cardinality": 30}}
    data = {**rows, "integers": ("I1", "I2"), "categories": ("C1", "C2", "C3")}
    found = summary_of(0, 1, config(tmp_path, data=data, train={"global_batch_size": 128, "epochs": 3, "schedule": schedule}))
    assert found["generator_auc"] > 0.75
    assert found["auc"] > found["generator_auc"] - 0.01
    assert found["normalized_entropy"] < 0.9
    assert found["calibration"] == pytest.approx(1, abs=0.1)


def test_training_that_gets_no_better_stops_and_says_so(tmp_path: Path) -> None:
    settings = config(
        tmp_path, train={"global_batch_size": 256, "max_steps": 40}, eval={"every_steps": 5, "patience": 2, "min_gain": 0.5}
    )
    found = run_ranks(2, summary_of, settings)[0]
    assert (found["steps"], found["stopped_early"]) == (15, True)
    (folder,) = tmp_path.iterdir()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 16))
    assert [record["step"] for record in records if "evaluation" in record] == [5, 10, 15]
    assert records[-2]["evaluation"]["auc"] == found["auc"]


def scores(world_size: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(world_size)
    values = np.round(rng.normal(size=999), 2).astype(np.float32)
    return values, (rng.random(999) < 1 / (1 + np.exp(-values))).astype(np.int8)


def auc_of(rank: int, world_size: int) -> tuple[float, float]:
    """Of scores of which rank 0 has none, and of scores that are all the same."""
    values, labels = scores(world_size)
    owner = np.arange(999) % (world_size - 1) + 1
    mine = owner == rank
    some = ctr_metrics.auc(values[mine], labels[mine], Comm.of(), CPU)
    return some, ctr_metrics.auc(np.zeros(mine.sum(), np.float32), labels[mine], Comm.of(), CPU)


@pytest.mark.parametrize("ranks", [exhaustive(2), 3])
def test_the_auc_is_exact_across_ranks(ranks: int) -> None:
    values, labels = scores(ranks)
    above = values[labels == 1][:, None] - values[labels == 0][None]
    expected = ((above > 0).sum() + (above == 0).sum() / 2) / above.size
    assert run_ranks(ranks, auc_of) == [(pytest.approx(expected, abs=1e-12), 0.5)] * ranks


def bins_of(rank: int, world_size: int) -> Any:
    values, labels = scores(3)
    mine = np.arange(999) % 2 == rank if world_size > 1 else slice(None)
    return calibration_bins(values[mine], labels[mine], Comm.of(), CPU, bins=7)


def test_calibration_bins_are_those_of_all_rows_whatever_rank_has_them() -> None:
    (alone,) = run_ranks(1, bins_of)
    assert len(alone["rows"]) == 7
    for found in run_ranks(3, bins_of):  # of which the last has no row
        assert (found["rows"], found["observed"]) == (alone["rows"], alone["observed"])
        np.testing.assert_allclose(found["predicted"], alone["predicted"], rtol=1e-12)


def data_of(rank: int, world_size: int, settings: CtrConfig) -> Any:
    from shardembed.recipes.data.clicks.scan import scan

    data = scan(settings.data, Comm.of())
    return data.describe(), data.counted, data.vocabularies


def test_ranks_share_the_scan_and_a_bad_file_is_told_on_all(tmp_path: Path) -> None:
    data = {"path": (str(tmp_path / "day_*"),), "ids": {"kind": "vocabulary", "min_count": 3}, "on_bad_row": "skip"}
    small = config(tmp_path).data
    settings = config(tmp_path, data={**small.model_dump(), **data, "generator": small.generator, "split": small.split})
    source = PlantedClicks(small.generator, Schema.of(small))
    for day in range(3):
        chunk = next(iter(source.chunks(0)))[day * 100 : day * 150 + 100]
        write(tmp_path / f"day_{day}", [chunk], Schema.of(small))
    with open(tmp_path / "day_2", "a") as file:
        file.write("1\t2\n")
    alone = run_ranks(1, data_of, settings)[0]
    assert alone[1].dropped.kinds == {"wrong number of fields": 1}
    assert run_ranks(2, data_of, settings) == [alone] * 2
    strict = settings.model_copy(update={"data": settings.data.model_copy(update={"on_bad_row": "raise"})})
    for outcome in run_ranks(4, data_of, strict, expect_errors=True):
        assert isinstance(outcome.error, DataError)
        assert str(outcome.error).startswith(f"{tmp_path / 'day_2'}:201: 2 field(s), but a row has 6")


def predictions_of(rank: int, world_size: int, settings: CtrConfig, folder: Path) -> None:
    task = prepare(settings, Comm.of())
    assert isinstance(task, CtrTask)
    evaluation.write_predictions(task, task.build(), folder)


def days(folder: Path, settings: CtrConfig) -> Clicks:
    """Two files of 150 rows each, with a bad line amid the first, and the good rows of both."""
    schema = Schema.of(settings.data)
    whole = next(iter(PlantedClicks(settings.data.generator, schema).chunks(0)))[:300]
    for day in range(2):
        write(folder / f"day_{day}", [whole[day * 150 : day * 150 + 150]], schema)
    lines = (folder / "day_0").read_text().splitlines(keepends=True)
    (folder / "day_0").write_text("".join([*lines[:20], "1\t2\n", *lines[20:]]))
    return whole


@pytest.mark.parametrize("validation", ["hash", "last", "file"])
def test_predictions_say_which_rows_of_the_data_they_are_of(tmp_path: Path, validation: str) -> None:
    base = config(tmp_path)
    whole = days(tmp_path, base)
    files = (str(tmp_path / "day_*"),)
    data = {**base.data.model_dump(), "path": files, "on_bad_row": "skip"}
    if validation == "file":
        data["validation_path"] = (str(tmp_path / "day_1"), str(tmp_path / "day_0"))
        whole, expected = concatenate([whole[150:], whole[:150]]), 300
    else:
        data["split"], expected = {"kind": validation, "fraction": 0.4, "seed": 5}, 120
    settings = CtrConfig.model_validate({**base.model_dump(), "data": data, "train": {"global_batch_size": 64}})
    run_ranks(2, predictions_of, settings, tmp_path / "out")
    parts = [parquet.read_table(tmp_path / "out" / f"part-0000{rank}.parquet") for rank in range(2)]
    rows, labels = (np.concatenate([part.column(name).to_numpy() for part in parts]) for name in ("row", "label"))
    assert len(set(rows.tolist())) == len(rows)
    assert len(rows) == expected if validation != "hash" else 60 < len(rows) < 180
    assert 0.1 < labels.mean() < 0.9
    np.testing.assert_array_equal(labels, whole.labels[rows])
    if validation != "hash":
        assert sorted(rows.tolist()) == list(range(300 - expected, 300))
