"""A model that predicts the next item trains alike on any number of ranks, and goes on where it was saved."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console

from shardembed.recipes import train
from shardembed.recipes.build import SequenceJob
from shardembed.recipes.sequence_config import SequenceConfig
from tests.amount import exhaustive
from tests.harness import run_ranks


class Crash(Exception):
    """What an interrupted run ends with."""


def config(run_dir: Path, **train_settings: Any) -> SequenceConfig:
    return SequenceConfig.model_validate(
        {
            "name": "test",
            "data": {"generator": {"users": 300, "items": 60, "length": 8, "successors": 2}},
            "model": {"embedding_dim": 8, "max_length": 6, "feedforward": 12, "negatives": 32, "dropout": 0.2},
            "optimizer": {"dense": {"lr": 5e-3}},
            "train": {
                "global_batch_size": 50,
                "max_steps": 40,
                "schedule": {"warmup_steps": 5, "decay": "cosine"},
                **train_settings,
            },
            "plan": {"item": "row_wise"},
            "checkpoint": {"every_steps": 10},
            "eval": {"k": 5, "every_steps": 20, "patience": 5},
            "run_dir": str(run_dir),
        }
    )


def summary_of(rank: int, world_size: int, settings: SequenceConfig, crash: int | None = None) -> dict[str, Any]:
    weights: list[np.ndarray] = []
    made = SequenceJob._batch

    def batch(self: SequenceJob, part: Any, step: int) -> Any:
        if step == crash:
            raise Crash
        return made(self, part, step)

    def evaluate(task: Any, job: Any) -> Any:
        weights[:] = [job.model.tables.rows("item", torch.arange(60)).numpy()]
        return task.evaluate(job)

    with mock.patch.object(SequenceJob, "_batch", batch), mock.patch.object(train, "evaluate", evaluate):
        try:
            return {**train.run(settings, Console(file=io.StringIO())), "weights": weights[0]}
        except Crash:
            return {}


@pytest.mark.parametrize("batch_size", [exhaustive(50), 3])  # of 3, a fourth rank gets none
def test_losses_and_metrics_do_not_depend_on_the_number_of_ranks(tmp_path: Path, batch_size: int) -> None:
    settings = config(tmp_path, global_batch_size=batch_size)
    alone = run_ranks(1, summary_of, settings)[0]
    assert len(alone["losses"]) == 20
    for ranks in (2, 4):
        for summary in run_ranks(ranks, summary_of, settings):
            assert summary["losses"] == pytest.approx(alone["losses"], abs=1e-3)
            np.testing.assert_allclose(summary["weights"], alone["weights"], atol=2e-3)
            for name in ("ndcg@5", "generator_recall@5", "generator_ndcg@5", "popularity_recall@5", "evaluated_users", "steps"):
                assert summary[name] == pytest.approx(alone[name], abs=3e-3), name


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = run_ranks(2, summary_of, config(tmp_path / "whole"))[0]
    settings = config(tmp_path / "parts")
    assert run_ranks(2, summary_of, settings, 17) == [{}, {}]
    found = run_ranks(2, summary_of, settings)[0]
    assert len(list((tmp_path / "parts").iterdir())) == 1
    np.testing.assert_array_equal(found["weights"], whole["weights"])
    for name in ("losses", "recall@5", "ndcg@5", "steps"):
        assert found[name] == whole[name], name
