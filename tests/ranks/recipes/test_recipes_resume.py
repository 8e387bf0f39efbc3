"""A run that was interrupted goes on where it was saved: on any number of ranks, with no batch left out and none taken twice."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from rich.console import Console

from shardembed.errors import ConfigError, DataError
from shardembed.recipes import runs, tasks, train
from shardembed.recipes.build import Job
from shardembed.recipes.common import CheckpointConfig, RankingConfig
from shardembed.recipes.config import Config, DataConfig, GeneratorConfig, ModelConfig, TrainConfig
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data import kept
from shardembed.recipes.data.interactions import Pairs, pairs_of
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.data.text import SAMPLE_BYTES, TextFile
from tests.amount import exhaustive
from tests.harness import run_ranks

STEPS = 34  # 14 an epoch, and a checkpoint every 5


class Crash(Exception):
    """What an interrupted run ends with here; the processes stay, and what they held is let go of."""


def config(run_dir: str) -> Config:
    return Config(
        name="test",
        data=DataConfig(generator=GeneratorConfig(users=150, items=80, interactions=1500, tastes=5), shuffle_buffer=300),
        model=ModelConfig(embedding_dim=8, negatives=32, towers=(6,)),
        train=TrainConfig(epochs=3, global_batch_size=100, max_steps=STEPS),
        checkpoint=CheckpointConfig(every_steps=5),
        eval=RankingConfig(k=5, every_steps=None),
        run_dir=run_dir,
    )


def run_until(rank: int, world_size: int, run_dir: str, crash: int | str | None) -> dict[str, Any]:
    """Run the job; end it before the step `crash`, or as the evaluation begins. Says which batches were trained on, and the end."""
    taken: list[tuple[int, int]] = []
    read: list[int] = []
    job: list[Job] = []
    step_of_job = Job.step

    def part(chunk: Chunk, rank: int, world_size: int) -> Pairs:
        read.append(zlib.crc32(np.stack([chunk.users, chunk.items]).tobytes()))
        return pairs_of(chunk, rank, world_size)

    def step(self: Job, part: Pairs, step: int) -> torch.Tensor:
        if step == crash:
            raise Crash
        job[:] = [self]
        taken.append((step, read[-1]))
        return step_of_job(self, part, step)

    def evaluate(*_: object) -> None:
        raise Crash

    said = io.StringIO()
    with mock.patch.object(Job, "step", step), mock.patch.object(tasks, "pairs_of", part):
        try:
            if crash == "evaluation":
                with mock.patch.object(train, "evaluate", evaluate):
                    train.run(config(run_dir), Console(file=said, width=300))
            else:
                summary = train.run(config(run_dir), Console(file=said, width=300))
        except Crash:
            return {"taken": taken, "said": said.getvalue()}
    weights = []
    if job:
        tables = job[0].model.tables
        weights = [tables.rows(name, torch.arange(count)).numpy() for name, count in (("user", 150), ("item", 80))]
    return {"taken": taken, "said": said.getvalue(), "summary": summary, "weights": weights}


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    (folder,) = run_dir.iterdir()
    first, *lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert first["settings"]["run_dir"] == str(run_dir)
    return lines


def whole_run(folder: Path, ranks: int) -> dict[str, Any]:
    """The run that nothing happens to."""
    found = run_ranks(ranks, run_until, str(folder), None)[0]
    assert [step for step, _ in found["taken"]] == list(range(STEPS))
    return {**found, "metrics": metrics_of(folder)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return whole_run(tmp_path_factory.mktemp("whole"), ranks=2)


@pytest.mark.parametrize("ranks", [2, exhaustive(3)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, ranks: int, whole: dict[str, Any]) -> None:
    expected = whole if ranks == 2 else whole_run(tmp_path / "whole", ranks)
    folder = tmp_path / "interrupted"
    first = run_ranks(ranks, run_until, str(folder), 18)[0]
    second = run_ranks(ranks, run_until, str(folder), None)[0]
    assert f"at step 15 of 34 (saved on {ranks} ranks, now {ranks})" in second["said"]
    assert first["taken"][:15] + second["taken"] == expected["taken"]
    for found, wanted in zip(second["weights"], expected["weights"], strict=True):
        np.testing.assert_array_equal(found, wanted)
    metrics = metrics_of(folder)
    assert metrics[:-1] == expected["metrics"][:-1]  # a line a step, with the same losses
    for name in ("losses", "steps", "recall@5", "ndcg@5"):
        assert second["summary"][name] == expected["summary"][name]


def test_a_run_is_resumed_on_other_numbers_of_ranks(tmp_path: Path, whole: dict[str, Any]) -> None:
    parts = [(2, 11, 0), (3, 23, 10), (1, 33, 20), (2, None, 30)]  # ranks, the step they do not come to, where they begin
    taken: dict[int, int] = {}
    for ranks, crash, begins in parts:
        found = run_ranks(ranks, run_until, str(tmp_path), crash)[0]
        assert found["taken"][0][0] == begins
        taken.update(dict(found["taken"]))  # what was taken again has replaced what was lost
        for step, content in found["taken"]:
            assert content == whole["taken"][step][1]
    assert list(taken.items()) == whole["taken"]
    metrics = metrics_of(tmp_path)
    assert [record["step"] for record in metrics[:-1]] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in metrics[:-1]] == pytest.approx([r["loss"] for r in whole["metrics"][:-1]], rel=1e-3)
    assert metrics[-1]["steps"] == STEPS


def test_a_run_that_was_lost_in_its_evaluation_is_only_evaluated(tmp_path: Path, whole: dict[str, Any]) -> None:
    assert len(run_ranks(2, run_until, str(tmp_path), "evaluation")[0]["taken"]) == STEPS
    found = run_ranks(2, run_until, str(tmp_path), None)[0]
    assert found["taken"] == []
    assert "at step 34 of 34" in found["said"]
    for name in ("losses", "steps", "recall@5", "ndcg@5"):
        assert found["summary"][name] == whole["summary"][name]
    assert metrics_of(tmp_path)[:-1] == whole["metrics"][:-1]


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    for count in (1, 2):
        assert len(run_until(0, 1, str(tmp_path), None)["taken"]) == STEPS
        assert len(list(tmp_path.iterdir())) == count


def blind(rank: int, world_size: int, run_dir: str) -> str:
    """Run where rank 1 sees an empty folder in the place of rank 0's."""
    with mock.patch.object(runs, "LOCK", "lock" if rank == 0 else "unseen"), pytest.raises(ConfigError) as caught:
        train.run(config(run_dir), Console(file=io.StringIO()))
    return str(caught.value)


def test_ranks_that_do_not_see_the_run_folder_are_named_on_all(tmp_path: Path) -> None:
    for message in run_ranks(2, blind, str(tmp_path)):
        assert message.startswith(f"run_dir: rank(s) 1 do not see {tmp_path}/test-")
        assert "all ranks need one file system" in message


def changing(rank: int, world_size: int, settings: Config | CtrConfig, when: int) -> str:
    """Train where rank 1 reads other rows from the file from its pass number `when` on (the scan is the first)."""
    passes = [0]
    made = TextFile._blocks

    def blocks(self: Any, size: int) -> Iterator[tuple[int, bytes]]:
        passes[0] += size != SAMPLE_BYTES
        for line, data in made(self, size):
            yield line, data[: len(data) // 2] if rank == 1 and passes[0] >= when else data

    with (
        mock.patch.object(kept, "KEPT_BYTES", 0),
        mock.patch.object(TextFile, "_blocks", blocks),
        pytest.raises(DataError) as caught,
    ):
        train.run(settings, Console(file=io.StringIO()))
    return str(caught.value)


@pytest.mark.parametrize(("kind", "when"), [("pairs", 3), exhaustive("pairs", 5), exhaustive("clicks", 2), ("clicks", 4)])
def test_data_that_changed_on_one_rank_end_all_of_them(tmp_path: Path, kind: str, when: int) -> None:
    """In a later epoch, and in the evaluation at the end."""
    data = tmp_path / "data.csv"
    settings: Config | CtrConfig
    if kind == "pairs":
        data.write_text("user_id,item_id\n" + "".join(f"{row % 30},{row % 17}\n" for row in range(300)))
        settings = config(str(tmp_path / "runs"))
        settings = settings.model_copy(update={"data": DataConfig(path=(str(data),)), "train": TrainConfig(epochs=3)})
    else:
        data.write_text("".join(f"{row % 2}\t{row}\t{row % 17:x}\n" for row in range(300)))
        settings = CtrConfig.model_validate(
            {
                "data": {"path": (str(data),), "integers": ("I1",), "categories": ("C1",)},
                "model": {"embedding_dim": 4},
                "train": {"epochs": 3},
                "run_dir": str(tmp_path / "runs"),
            }
        )
    told = run_ranks(2, changing, settings, when)
    assert all(f"{data}" in message and "the data have changed under the run" in message for message in told)
