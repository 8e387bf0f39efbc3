"""Where clicks have a validation part, it chooses the weights and the result is of the test, on any number of ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet
from rich.console import Console

from shardembed.recipes import evaluation, train
from shardembed.recipes.build import CtrJob
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.use.opened import open_checkpoint
from tests.amount import exhaustive
from tests.harness import run_ranks

ROWS, HELD = 1000, 200
RNG = np.random.default_rng(11)
SHOP, DAY = RNG.integers(150, size=ROWS), RNG.integers(50, size=ROWS)
PRICE = RNG.normal(size=ROWS)
CLICKED = (RNG.random(ROWS) < 1 / (1 + np.exp(-0.3 * PRICE - RNG.normal(0, 1.5, 150)[SHOP]))).astype(np.int64)
FEATURES = (
    {"name": "shop", "kind": "id"},
    {"name": "price", "kind": "number", "scale": "raw"},
    {"name": "clicked", "kind": "label"},
    {"name": "day", "kind": "time"},
)


class Crash(Exception):
    """What an interrupted run ends with."""


def config(folder: Path, kind: str, validation: bool = True, **train: Any) -> CtrConfig:
    """A job that soon learns its rows by heart; kind: of the split, or `files` where the last rows are a file of their own."""
    table = pa.table({"clicked": CLICKED, "shop": SHOP, "price": PRICE, "day": DAY})
    cut = ROWS - HELD
    for name, rows in (("all", table), ("first", table[:cut]), ("last", table[cut:])):
        csv.write_csv(rows, folder / f"{name}.csv")
    split: dict[str, Any] = {"kind": kind, "fraction": HELD / ROWS, "validation": validation}
    paths = {"path": (str(folder / "all.csv"),)}
    if kind == "files":
        paths = {"path": (str(folder / "first.csv"),), "validation_path": (str(folder / "last.csv"),)}
        split |= {"kind": "last", "fraction": HELD / cut}
    return CtrConfig.model_validate(
        {
            "name": "test",
            "data": {**paths, "features": FEATURES, "split": split},
            "model": {"embedding_dim": 8, "bottom": (8,), "top": (8,)},
            "optimizer": {"dense": {"lr": 0.02}, "tables": {"lr": 0.3}},
            "train": {"global_batch_size": 60, "epochs": 8, **train},
            "checkpoint": {"every_steps": 7},
            "log": {"page": False},
            "run_dir": str(folder / "runs"),
        }
    )


def trained(
    rank: int, world_size: int, settings: CtrConfig, crash: int | None = None, former: str | None = None
) -> tuple[dict[str, Any], str]:
    """The summary and what was said; nothing of a run that was interrupted before the step `crash`."""
    made, said = CtrJob._batch, io.StringIO()

    def batch(self: CtrJob, part: Any, step: int) -> Any:
        if step == crash:
            raise Crash
        return made(self, part, step)

    with mock.patch.object(CtrJob, "_batch", batch):
        try:
            return train.run(settings, Console(file=said, width=200), from_run=former), said.getvalue()
        except Crash:
            return {}, said.getvalue()


def evaluated(rank: int, world_size: int, settings: CtrConfig, run: str, folder: str) -> dict[str, Any]:
    return evaluation.run(settings, Console(file=io.StringIO()), run, folder)


def scored(rank: int, world_size: int, run: str, file: str) -> np.ndarray:
    """Log-odds of all rows, whatever they are held out for, by the weights that the run has ended with."""
    scorer = open_checkpoint(run).scorer
    assert scorer is not None
    return np.concatenate([scorer.logits(chunk) for chunk in scorer.open((file,)).chunks(0)])


def figures(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUC over all pairs, and the log loss."""
    above = logits[labels == 1][:, None] - logits[labels == 0][None]
    chances = 1 / (1 + np.exp(-logits.astype(np.float64)))
    loss = -np.log(np.where(labels == 1, chances, 1 - chances)).mean()
    return {"auc": ((above > 0).sum() + (above == 0).sum() / 2) / above.size, "log_loss": loss, "evaluated_rows": len(labels)}


def parts(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the rows for validation and of those for the test, among all."""
    rows = np.arange(ROWS)
    if kind != "time":
        return rows[-2 * HELD : -HELD], rows[-HELD:]
    test = np.sort(DAY)[-HELD] <= DAY
    rest = np.sort(DAY[~test])
    return rows[(rest[-HELD] <= DAY) & ~test], rows[test]


def evaluations(summary: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Those during training, by their steps."""
    lines = map(json.loads, (Path(summary["run_dir"]) / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(("kind", "ranks"), [("time", 2), ("last", 1), exhaustive("time", 1), exhaustive("last", 2), ("files", 2)])
def test_validation_chooses_the_weights_and_the_result_is_of_the_test(tmp_path: Path, kind: str, ranks: int) -> None:
    settings = config(tmp_path, kind)
    summary, said = run_ranks(ranks, trained, settings)[0]
    validation, test = parts(kind)
    during = evaluations(summary)
    chosen = max(during, key=lambda step: during[step]["auc"])
    assert summary["best_step"] == chosen < summary["steps"], "it learns the rows by heart"
    assert summary["steps"] == 8 * -(-(ROWS - len(validation) - len(test)) // 60), "neither part is trained on"
    (logits,) = run_ranks(1, scored, summary["run_dir"], str(tmp_path / "all.csv"))
    of_validation, of_test = (figures(logits[rows], CLICKED[rows]) for rows in (validation, test))
    assert abs(of_validation["auc"] - of_test["auc"]) > 0.005, "else this test tells nothing"
    same(during[chosen], of_validation)
    same(summary, of_test)
    assert summary["logistic_auc"] != during[chosen]["logistic_auc"], "it is asked about the same rows"
    assert f"{len(validation)} for validation, {len(test)} for the test" in said
    assert f"\n{len(test)} rows for the test" in said
    assert "flatters" not in said
    found = run_ranks(ranks, evaluated, settings, summary["run_dir"], str(tmp_path / "out"))[0]
    same(found, of_test)
    table = parquet.read_table(tmp_path / "out").sort_by("row")
    rows, labels, predictions = (table.column(name).to_numpy() for name in ("row", "label", "prediction"))
    assert (rows + (kind == "files") * (ROWS - HELD)).tolist() == test.tolist()
    assert labels.tolist() == CLICKED[test].tolist()
    same(summary, figures(np.log(predictions / (1 - predictions)), labels))


def test_without_a_validation_part_it_is_said_that_one_part_is_for_both(tmp_path: Path) -> None:
    summary, said = run_ranks(1, trained, config(tmp_path, "last", validation=False, epochs=14))[0]
    best = evaluations(summary)[summary["best_step"]]
    assert best["auc"] == summary["auc"]
    assert "(chosen by the same ones, which flatters a little)" in said
    assert f"\n{HELD} rows for validation" in said


def test_a_run_that_goes_on_has_the_same_best_and_the_same_result(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected, _ = run_ranks(1, trained, config(_made(whole), "time"))[0]
    crash = expected["best_step"] + 9
    settings = config(_made(broken), "time")
    assert run_ranks(2, trained, settings, crash)[0][0] == {}
    found, said = run_ranks(1, trained, settings)[0]
    assert f"resuming {found['run_dir']} at step" in said
    assert found["best_step"] == expected["best_step"]
    same(found, {name: expected[name] for name in ("auc", "log_loss", "evaluated_rows", "steps")})
    assert {step: one["auc"] for step, one in evaluations(found).items()} == pytest.approx(
        {step: one["auc"] for step, one in evaluations(expected).items()}, abs=2e-3
    )


def test_a_run_from_another_compares_the_test_before_and_after(tmp_path: Path) -> None:
    settings = config(tmp_path, "last", epochs=1)
    first, _ = run_ranks(1, trained, settings)[0]
    second, said = run_ranks(2, trained, settings, None, first["run_dir"])[0]
    same(second["before"], {name: first[name] for name in ("auc", "log_loss", "logistic_auc")})
    assert 0 not in evaluations(second), "a curve is of the rows for validation alone"
    assert f"before this training and after: auc {second['before']['auc']:.4f} -> {second['auc']:.4f}" in said


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder
