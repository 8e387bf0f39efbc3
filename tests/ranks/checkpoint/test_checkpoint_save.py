"""Saving: in the background, over and over, and onto a full disk. What was complete before stays loadable."""

from __future__ import annotations

import errno
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import shardembed as se
from shardembed.checkpoint import folders
from shardembed.checkpoint.format.manifest import read_manifest
from shardembed.errors import NonFiniteError, NonFiniteWarning
from tests.harness import run_ranks
from tests.ranks.saved import Trained, built, contents, equal, load_alone, raised, small_files, train

# What is said between ranks


def count_calls(rank: int, world_size: int, folder: str) -> tuple[int, int, int]:
    job = built(world_size, "Adam", turn=1)
    train(job, rank, world_size, range(1))
    job.save(folder)  # makes the group
    training, side = se.Comm.of().tally, se.Comm.of().side().tally
    training.clear()
    side.clear()
    job.save(folder)
    saving = side.operations()["all_to_all"]
    side.clear()
    job.load(folder)
    return saving, side.operations()["all_to_all"], sum(training.operations().values())


def test_as_many_calls_are_made_as_documented_and_none_on_the_groups_of_training(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "collectives.md").read_text(encoding="utf-8")
    for saving, loading, training in run_ranks(2, count_calls, str(tmp_path)):
        assert (
            f"Saving a checkpoint costs {saving} all-to-alls of short texts and loading one {loading}, on a process group" in page
        )
        assert training == 0


# In the background


def save_in_background(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=1)
    train(job, rank, world_size, range(2))
    held = contents(job)
    pending = se.async_save_checkpoint(folder, job.wrapped, optimizer=job.optimizer, scheduler=job.scheduler)
    train(job, rank, world_size, range(2, 6))  # collectives of both kinds run side by side
    first = pending.wait()
    again = se.async_save_checkpoint(folder, job.wrapped, optimizer=job.optimizer, scheduler=job.scheduler)
    path = job.save(folder)  # waits for the one before
    return held, first.name, pending.done, again.done, path.name, contents(job)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_training_goes_on_while_a_thread_writes_what_was(tmp_path: Path, ranks: int) -> None:
    answers = run_ranks(ranks, save_in_background, str(tmp_path))
    assert {answer[1:5] for answer in answers} == {("step-0000000002", True, True, "step-0000000006.1")}
    equal(load_alone(tmp_path, step=2)[1], [held for held, *_ in answers])
    equal(load_alone(tmp_path)[1], [held for *_, held in answers])


def fail_in_background(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=1)
    train(job, rank, world_size, range(1))
    with small_files(rank == world_size - 1):
        pending = se.async_save_checkpoint(folder, job.wrapped, optimizer=job.optimizer, scheduler=job.scheduler)
        message = raised(pending.wait)
    told_again = raised(lambda: job.save(folder))  # nobody is left in the dark
    return message, told_again, job.save(folder).name


def test_a_background_save_that_fails_is_told_by_wait_and_by_the_next_save(tmp_path: Path) -> None:
    answers = run_ranks(2, fail_in_background, str(tmp_path))
    assert len(set(answers)) == 1
    message, told_again, name = answers[0]
    assert "rank 1" in message
    assert "File too large" in message
    assert told_again == message
    assert name == "step-0000000001"


# Over and over


def save_again(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    found = []
    for step in range(5):
        train(job, rank, world_size, range(step, step + 1))
        job.save(folder, keep=2)
        found.append([path.name for _, path in se.checkpoints(folder)])
        se.Comm.of().all_reduce("test: all have looked", torch.zeros(1))
    job.save(folder, step=5, keep=2)
    return found, [path.name for _, path in se.checkpoints(folder)], contents(job)


def test_the_newest_are_kept_and_a_step_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    answers = run_ranks(2, save_again, str(tmp_path))
    found, last, _ = answers[0]
    assert found[1] == ["step-0000000001", "step-0000000002"]
    assert found[4] == ["step-0000000004", "step-0000000005"]
    assert last == ["step-0000000004", "step-0000000005.1"]
    assert sorted(os.listdir(tmp_path)) == [".lock", *last]
    assert se.newest_checkpoint(tmp_path) == tmp_path / last[1]
    equal(load_alone(tmp_path)[1], [held for *_, held in answers])


def save_until(rank: int, world_size: int, folder: str, mode: str, steps: list[int], load: int | None, keep: int | None) -> Any:
    job = built(world_size, "Adam", turn=0)
    if load is not None:
        job.load(folder, step=load)
    found = []
    for step in steps:
        train(job, rank, world_size, range(step, step + 1))
        if mode == "async":
            se.async_save_checkpoint(
                folder, job.wrapped, optimizer=job.optimizer, scheduler=job.scheduler, step=step, keep=keep
            ).wait()
        else:
            job.save(folder, step=step, keep=keep, incremental=mode == "incremental")
        newest = se.newest_checkpoint(folder)
        found.append((newest.name if newest else None, [path.name for _, path in se.checkpoints(folder)]))
        se.Comm.of().all_reduce("test: all have looked", torch.zeros(1))
    return found, contents(job)


@pytest.mark.parametrize(("ranks", "mode"), [(1, "full"), (2, "full"), (2, "async"), (2, "incremental")])
def test_a_run_that_went_back_keeps_and_loads_what_it_saves_from_there(tmp_path: Path, ranks: int, mode: str) -> None:
    folder = str(tmp_path)
    run_ranks(ranks, save_until, folder, mode, [10, 20, 30], None, None)
    (found, _), *_ = answers = run_ranks(ranks, save_until, folder, mode, [15, 20], 10, 2)
    full = ["step-0000000015-r1"]  # loading ends increments, so the first save after it is full
    assert found[0] == ("step-0000000015-r1", ["step-0000000010", *full])
    assert found[1] == ("step-0000000020-r1", [*full, "step-0000000020-r1"])
    restored, held = load_alone(tmp_path)
    assert restored.step == 20
    equal(held, [held for _, held in answers])
    (found, _), *_ = run_ranks(ranks, save_until, folder, mode, [25], 20, 2)  # another process, which goes straight on
    kept = ["step-0000000020-r1", "step-0000000025-r1"]
    assert found == [("step-0000000025-r1", [*full, *kept] if mode == "incremental" else kept)]


def save_lost(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    train(job, rank, world_size, range(1))
    job.model.register_buffer("mask", torch.tensor([0.0, float("-inf")]))  # as it should be
    job.save(folder, keep=1)
    held, told = contents(job), []
    for step in (2, 3):
        for local in job.model.tables.local_shards():
            if local.table == "t1" and len(local.shard.rows) and 36 - 1 in local.shard.rows:
                local.weights[local.shard.rows.index(35)] = float("nan")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            job.save(folder, step=step, keep=1)
        told.append([str(each.message) for each in caught if each.category is NonFiniteWarning])
    with pytest.raises(NonFiniteError) as refused:
        job.save(folder, step=4, keep=1, on_nonfinite="raise")
    pending = se.async_save_checkpoint(
        folder, job.wrapped, optimizer=job.optimizer, scheduler=job.scheduler, step=4, on_nonfinite="raise"
    )
    with pytest.raises(NonFiniteError):
        pending.wait()
    with pytest.raises(NonFiniteError):
        job.load(folder, step=1)  # what the background save met is told again
    job.load(folder, step=1)
    equal_here = contents(job)
    return told, str(refused.value), sorted(os.listdir(folder)), held, equal_here


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_table_with_nan_never_takes_the_place_of_the_last_finite_checkpoint(tmp_path: Path, ranks: int) -> None:
    answers = run_ranks(ranks, save_lost, str(tmp_path))
    assert len({(refused, tuple(left)) for _, refused, left, _, _ in answers}) == 1
    told, refused, left, *_ = answers[0]
    for step, texts in zip((2, 3), told, strict=True):
        assert texts == [
            f"{tmp_path}/step-000000000{step} holds inf or nan in 'tables.t1.weight'; the newest one there that does not is "
            "step-0000000001"
        ]
    assert all(texts == [[], []] for texts, *_ in answers[1:])
    assert refused.startswith(f"{tmp_path}: no checkpoint of step 4 was saved, since inf or nan is in 'tables.t1.weight'")
    assert left == [".lock", "step-0000000001", "step-0000000003"]
    equal([answer[4] for answer in answers], [answer[3] for answer in answers])
    assert read_manifest(tmp_path / "step-0000000003").nonfinite == ("tables.t1.weight",)
    with pytest.warns(NonFiniteWarning, match="step-0000000003 holds inf or nan in 'tables.t1.weight'"):
        se.load_plain(tmp_path, torch.nn.ModuleDict({"head": torch.nn.Linear(6, 1, dtype=torch.float64)}))


def save_into(rank: int, world_size: int, folder: str) -> str:
    job = built(world_size, "Adam", turn=0)
    train(job, rank, world_size, range(1))
    return job.save(folder).name


def test_what_a_crash_left_is_removed_and_never_loaded(tmp_path: Path) -> None:
    for name in (".saving-0000000009-abcd", ".removed-step-0000000008-abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("of the user's")
    assert se.newest_checkpoint(tmp_path) is None
    assert "no complete checkpoint" in raised(lambda: load_alone(tmp_path))
    assert run_ranks(2, save_into, str(tmp_path)) == ["step-0000000001"] * 2
    assert sorted(os.listdir(tmp_path)) == [".lock", "notes.txt", "step-0000000001"]


def test_two_jobs_do_not_save_into_one_folder(tmp_path: Path) -> None:
    import fcntl

    with open(tmp_path / ".lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        message = raised(lambda: save_into(0, 1, str(tmp_path)))
    assert f"{tmp_path}: another job is saving into this folder" in message
    assert save_into(0, 1, str(tmp_path)) == "step-0000000001"


# Onto a full disk


def save_without_room(rank: int, world_size: int, folder: str, where: int) -> Any:
    job = built(world_size, "Adam", turn=0)
    train(job, rank, world_size, range(1))
    job.save(folder)
    held = contents(job)
    train(job, rank, world_size, range(1, 2))
    with small_files(rank == where):
        message = raised(lambda: job.save(folder))
    left = sorted(os.listdir(folder))
    losses = train(job, rank, world_size, range(2, 4))
    restored = job.load(folder)
    return message, left, len(losses), restored.step, held, contents(job)


@pytest.mark.parametrize("where", [0, 1])
def test_a_full_disk_fails_the_save_on_all_ranks_and_training_goes_on(tmp_path: Path, where: int) -> None:
    answers = run_ranks(2, save_without_room, str(tmp_path), where)
    assert len({answer[:4] for answer in [(m, tuple(files), count, step) for m, files, count, step, *_ in answers]}) == 1
    message, files, count, step, *_ = answers[0]
    assert message.startswith(f"rank {where}: {tmp_path}/.saving-")
    assert os.strerror(errno.EFBIG) in message
    assert files == [".lock", "step-0000000001"]
    assert (count, step) == (2, 1)
    equal([answer[5] for answer in answers], [answer[4] for answer in answers])


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = raised(lambda: save_into(0, 1, str(tmp_path)))
    assert "1,000 are free" in message
    assert os.listdir(tmp_path) == [".lock"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = raised(lambda: save_into(0, 1, str(tmp_path / "file" / "checkpoints")))
    assert f"{tmp_path}/file" in message


# What else is saved


class Counter:
    """State that is neither tensors nor JSON alone."""

    def __init__(self) -> None:
        self.state: Any = {
            "cursor": (3, 4),
            7: b"seven",
            "seen": {1, 2},
            "big": 1 << 90,
            "share": 0.1,
            "nan": float("nan"),
            "t": torch.ones(2),
        }

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def save_and_draw(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    train(job, rank, world_size, range(3))
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)
    job.save(folder, extra={"loader": Counter()}, progress={"epoch": 2, "files": ["a", "b"]})
    return draw(), job.scheduler.get_last_lr()


def load_and_draw(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    counter = Counter()
    counter.state = None
    restored = job.load(folder, extra={"loader": counter})
    rates = [group["lr"] for group in job.optimizer.param_groups]
    return draw(), job.scheduler.get_last_lr(), restored, counter.state, rates, job.scheduler.last_epoch


def test_schedules_random_states_progress_and_extras_come_back(tmp_path: Path) -> None:
    saved = run_ranks(2, save_and_draw, str(tmp_path))
    found = run_ranks(2, load_and_draw, str(tmp_path))
    assert saved[0][0] != saved[1][0]
    for (drawn, rates), (drawn_again, rates_again, restored, extra, groups, epochs) in zip(saved, found, strict=True):
        assert drawn == drawn_again
        assert rates == rates_again == groups
        assert epochs == 3
        assert restored.progress == {"epoch": 2, "files": ["a", "b"]}
        assert torch.equal(extra.pop("t"), torch.ones(2))
        assert np.isnan(extra.pop("nan"))
        assert extra == {"cursor": (3, 4), 7: b"seven", "seen": {1, 2}, "big": 1 << 90, "share": 0.1}
    more = run_ranks(3, load_and_draw, str(tmp_path))
    assert len({drawn for drawn, *_ in more}) == 3  # each has a stream of its own


def refuse_to_save(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    train(job, rank, world_size, range(1))
    found = [
        raised(lambda: job.save(folder, progress={"model": job.model if rank == 1 else None})),
        raised(lambda: job.save(folder, keep=0)),
        raised(lambda: job.save(folder, step=-1)),
        raised(lambda: job.save(folder, step=rank)),
    ]
    job.wrapped(_batch(job)).backward()
    found.append(raised(lambda: job.save(folder)))
    job.optimizer.step()
    return found, job.save(folder).name


def _batch(job: Trained) -> dict[str, torch.Tensor]:
    return {table.name: torch.tensor([[0, 1]]) for table in job.model.tables.tables}


def test_what_cannot_be_saved_is_said_by_every_rank(tmp_path: Path) -> None:
    answers = run_ranks(2, refuse_to_save, str(tmp_path))
    assert answers[0] == answers[1]
    found, name = answers[0]
    assert found[0].startswith("rank 1: progress.model is a tests.ranks.saved.Model, which cannot be written without pickling it")
    assert "keep must be at least 1" in found[1]
    assert "step must be an integer from 0" in found[2]
    assert "ranks want different checkpoints: rank 0: step 0, full; rank 1: step 1, full" in found[3]
    assert "wait for Optimizer.step()" in found[4]
    assert name == "step-0000000002"
    assert [path.name for _, path in se.checkpoints(tmp_path)] == [name]
    assert not folders.leftovers(tmp_path)
