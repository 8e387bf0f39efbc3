"""All ranks end with the best weights, also those of a run that was begun on other ranks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console

from shardembed.checkpoint import checkpoints
from shardembed.errors import ShardEmbedError
from shardembed.recipes import train
from shardembed.recipes.config import Config
from tests.harness import run_ranks

CRASH = -1.0


class Crash(ShardEmbedError):
    """What a run is interrupted by."""


class Scored:
    """What an evaluation might find."""

    def __init__(self, score: float) -> None:
        self.score = score

    def to_json(self) -> dict[str, Any]:
        return {"recall@20": self.score}

    def show(self, console: Console) -> None:
        pass


def ended(rank: int, world_size: int, folder: Path, scores: list[float]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The summary, and the user table at each evaluation; empty where the run was interrupted."""
    settings = Config.model_validate(
        {
            "name": "test",
            "data": {"generator": {"users": 60, "items": 40, "interactions": 600}},
            "model": {"embedding_dim": 4, "negatives": 8, "towers": (4,)},
            "train": {"epochs": 4, "global_batch_size": 32},
            "checkpoint": {"keep": 1, "every_steps": 1},
            "log": {"page": False},
            "run_dir": str(folder),
        }
    )
    tables: list[torch.Tensor] = []
    left = iter(scores)

    def evaluate(task: Any, job: Any) -> Scored:
        tables.append(job.model.tables.rows("user", torch.arange(10)).clone())
        score = next(left)
        if score == CRASH:
            raise Crash("as the test wants")
        return Scored(score)

    with mock.patch.object(train, "evaluate", evaluate):
        try:
            return train.run(settings, Console(file=io.StringIO())), tables
        except Crash:
            return {}, tables


def test_ranks_end_with_the_best_weights_of_a_run_that_others_began(tmp_path: Path) -> None:
    begun = run_ranks(3, ended, tmp_path, [0.5, 0.9, CRASH])
    assert [summary for summary, _ in begun] == [{}] * 3
    (run,) = tmp_path.iterdir()
    assert [step for step, _ in checkpoints(run / "best")] == [4]
    for summary, tables in run_ranks(2, ended, tmp_path, [0.7, 0.8, 0.9]):
        assert (summary["steps"], summary["best_step"], summary["recall@20"]) == (8, 4, 0.9)
        assert torch.equal(tables[-1], begun[0][1][1])
        assert not torch.equal(tables[-1], tables[-2])
    assert [step for step, _ in checkpoints(run / "best")] == [4]
