"""Losses, gradients and tables that become inf or nan: a job stops or skips, on all ranks, says where, and keeps what is finite."""

from __future__ import annotations

import io
import json
import re
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

import shardembed as se
from shardembed.checkpoint.format.manifest import read_manifest
from shardembed.cli import main
from shardembed.errors import NonFiniteError
from shardembed.recipes import nonfinite, recorded, train
from shardembed.recipes.build import Job
from shardembed.recipes.common import CheckpointConfig, OptimizerConfig, RankingConfig, TableOptimizerConfig
from shardembed.recipes.config import Config, DataConfig, GeneratorConfig, ModelConfig, TrainConfig
from shardembed.recipes.models.two_tower import TwoTower
from tests.amount import exhaustive, sample_of, sampled
from tests.harness import run_ranks

STEPS = 12
SAVES = 3


def config(run_dir: str, policy: str, towers: tuple[int, ...] = (6,), lr: float = 0.1, saves: int | None = SAVES) -> Config:
    return Config(
        name="test",
        data=DataConfig(generator=GeneratorConfig(users=100, items=60, interactions=800, tastes=5), shuffle_buffer=300),
        model=ModelConfig(embedding_dim=8, negatives=16, towers=towers),
        optimizer=OptimizerConfig(tables=TableOptimizerConfig(name="SGD", lr=lr)),
        train=TrainConfig(epochs=3, global_batch_size=100, max_steps=STEPS, on_nonfinite=policy),
        checkpoint=CheckpointConfig(every_steps=saves, keep=1),
        eval=RankingConfig(k=5, every_steps=None),
        run_dir=run_dir,
    )


def spoilt(what: str, steps: tuple[int, ...], rank: int, here: int) -> ExitStack:
    """Spoil the loss, or a gradient under a finite loss, of these steps (from 0) on one rank."""
    around, at = ExitStack(), [0]
    step, forward = Job.step, TwoTower.forward

    def counted(self: Job, part: Any, number: int) -> torch.Tensor:
        at[0] = number
        return step(self, part, number)

    def lost(self: TwoTower, batch: Any) -> torch.Tensor:
        loss = forward(self, batch)
        if at[0] in steps and rank == here:
            if what == "loss alone":
                return loss + torch.tensor(float("inf"))  # with the gradients of the loss that there was
            if what == "loss":
                return loss * float("nan")
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    around.enter_context(mock.patch.object(Job, "step", counted))
    around.enter_context(mock.patch.object(TwoTower, "forward", lost))
    return around


def run(rank: int, world_size: int, settings: Config, what: str = "", steps: tuple[int, ...] = (), here: int = 0) -> dict[str, Any]:
    said = io.StringIO()
    with spoilt(what, steps, rank, here):
        try:
            summary = train.run(settings, Console(file=said, width=400))
        except NonFiniteError as error:
            return {"error": str(error), "said": said.getvalue()}
    return {"summary": summary, "said": said.getvalue()}


def folder_of(root: Path) -> Path:
    (folder,) = root.iterdir()
    return folder


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    _, *lines = [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines


@pytest.mark.parametrize(
    ("ranks", "what"), sampled([(1, "loss"), (2, "loss alone"), (1, "gradient"), (2, "loss"), (1, "loss alone")])
)
def test_a_job_stops_before_the_step_on_all_ranks_and_goes_on_when_the_reason_is_gone(
    tmp_path: Path, ranks: int, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_ranks(ranks, run, config(str(tmp_path), "stop"), what, (7,), ranks - 1)
    assert len({answer["error"] for answer in found}) == 1
    assert found[0]["error"].startswith(f"step 8 of {STEPS}: the loss or a gradient is inf or nan, seen by ")
    assert "'item'" in found[0]["error"]
    assert "'user'" in found[0]["error"]
    folder = folder_of(tmp_path)
    *lines, last = metrics_of(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert (last["step"], last["loss"]) == (8, None)
    assert last["stopped"] in found[0]["error"]
    shown = recorded.read(folder)
    assert shown.curves.loss.lost
    assert shown.state.startswith(f"unfinished, at step 8 of {STEPS} (stopped: step 8 of {STEPS}: the loss or a gradient")
    assert [path.name for _, path in se.checkpoints(folder / "checkpoints")] == ["step-0000000006"]
    assert main(["inspect", str(folder), "--json"]) == 0
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert (told["loss"], told["nonfinite_losses"], told["stopped"]) == (None, 1, last["stopped"])
    assert re.search(r"training loss, last step +inf or nan", printed.err)
    assert ">inf or nan<" in (folder / "run.html").read_text()
    again = run_ranks(ranks, run, config(str(tmp_path), "skip"))[0]  # the policy may change
    assert "at step 6 of 12" in again["said"]
    assert again["summary"]["steps"] == STEPS
    assert again["summary"]["skipped_steps"] == 0
    lines = [line for line in metrics_of(folder) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert not any("stopped" in line for line in lines)


@pytest.mark.parametrize(("ranks", "what"), [(1, "loss alone"), (2, "loss"), exhaustive(2, "gradient")])
def test_a_job_skips_such_steps_alone_and_counts_them(tmp_path: Path, ranks: int, what: str) -> None:
    settings = config(str(tmp_path), "skip")
    found = run_ranks(ranks, run, settings, what, (4, 7), ranks - 1)[0]
    assert found["summary"]["skipped_steps"] == 2
    assert f"2 of {STEPS} steps were skipped, because their loss or a gradient was inf or nan" in found["said"]
    for step in (5, 8):
        assert f"step {step}: the loss or a gradient is inf or nan, seen by" in found["said"]
    folder = folder_of(tmp_path)
    lines = [line for line in metrics_of(folder) if "loss" in line]
    assert [line["step"] for line in lines if line.get("skipped")] == [5, 8]
    assert all((line["loss"] is None) == ("skipped" in line and what != "gradient") for line in lines)
    shown = recorded.read(folder)
    assert shown.curves.skipped == 2
    assert "of which 2 were skipped" in shown.state
    assert read_manifest(se.newest_checkpoint(folder / "checkpoints") or folder).nonfinite == ()


def overflow(rank: int, world_size: int, run_dir: str, saves: int | None) -> dict[str, Any]:
    """The last step of all makes inf of a table, whose row nobody reads again."""

    def step(self: Job, part: Any, number: int) -> torch.Tensor:
        loss = taken(self, part, number)
        if number + 1 == STEPS:
            for local in self.model.tables.local_shards():
                if local.table == "item" and len(local.shard.rows) and local.shard.rows[-1] == 59:
                    local.weights[-1] = float("inf")
        return loss

    taken = Job.step
    with mock.patch.object(Job, "step", step):
        return run(rank, world_size, config(run_dir, "skip", saves=saves))


@pytest.mark.parametrize(("ranks", "saves"), sample_of(product([1, 2], [SAVES, None]), (2, SAVES), (1, None)))
def test_a_table_that_overflows_is_seen_before_it_is_saved_and_at_the_end(tmp_path: Path, ranks: int, saves: int | None) -> None:
    found = run_ranks(ranks, overflow, str(tmp_path), saves)
    assert len({answer["error"] for answer in found}) == 1
    assert found[0]["error"].startswith(f"step {STEPS} of {STEPS}: an update put inf or nan into ")
    assert "item" in found[0]["error"]
    folder = folder_of(tmp_path)
    assert not (folder / "summary.json").exists()
    assert metrics_of(folder)[-1]["stopped"]
    if saves is not None:
        assert [path.name for _, path in se.checkpoints(folder / "checkpoints")] == ["step-0000000009"]


def test_rates_that_overflow_stop_the_job_whatever_the_policy(tmp_path: Path) -> None:
    with mock.patch.object(nonfinite, "MOST_IN_A_ROW", 4):
        for policy in ("stop", "skip"):
            root = tmp_path / policy
            found = run(0, 1, config(str(root), policy, lr=1e30, towers=(), saves=None))
            assert "Training stopped" in found["error"]
    assert "the last 4 steps were all skipped, so skipping does not help" in found["error"]
