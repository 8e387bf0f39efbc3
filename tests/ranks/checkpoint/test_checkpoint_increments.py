"""Increments: only rows that changed are saved, however they changed, and they load like full checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.checkpoint.format.manifest import read_manifest
from tests.harness import run_ranks
from tests.held import Piece
from tests.ranks.saved import Trained, built, contents, equal, load_alone, raised, small_files, train


def save_increments(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=3, rows=300)
    found = []
    for step in range(4):
        train(job, rank, world_size, range(step, step + 1))
        path = job.save(folder, incremental=True, keep=1 if step == 3 else None)
        found.append((path.name, contents_quietly(job)))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_increments_hold_touched_rows_and_load_like_full_ones(tmp_path: Path, ranks: int) -> None:
    answers = run_ranks(ranks, save_increments, str(tmp_path))
    kept = [path.name for _, path in se.checkpoints(tmp_path)]
    assert kept == ["step-0000000001", "step-0000000004"]  # the first is what the last one stands on
    manifest = read_manifest(tmp_path / "step-0000000004")
    assert manifest.base is not None
    assert manifest.base.folder == "step-0000000001"
    entry = manifest.entries["tables.t0.weight.exp_avg"]
    rows = sum(update.ids.bytes // 8 for update in entry.updates if update.columns.start == 0)
    assert 100 < rows < 250  # 72 ids a step, of 300
    for loaded_by in (1, 2):
        found = run_ranks(loaded_by, _load_large, str(tmp_path))
        equal(found, [answer[3][1] for answer in answers])


def _load_large(rank: int, world_size: int, folder: str) -> list[Piece]:
    job = built(world_size, "Adam", turn=5, rows=300)
    job.load(folder)
    return contents(job)


def write_behind_the_steps(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    names = []

    def save() -> None:
        path = job.save(folder, incremental=True)
        names.append((path.name, read_manifest(path).base is not None, contents_quietly(job)))

    save()  # full
    save()  # nothing has changed
    table = torch.arange(37 * 6, dtype=torch.float64).view(37, 6)
    job.model.tables.load_rows("t0", table)
    save()
    job.model.tables.reset_parameters(seed=9)
    save()
    for local in job.model.tables.local_shards():
        local.weights.add_(1)
    save()
    job.load(folder, step=0)  # whatever was noted no longer counts
    save()
    return names


def contents_quietly(job: Trained) -> list[Piece]:
    """`contents`, without telling the tables that somebody may write."""
    noted = [None if slab.touched is None else slab.touched.clone() for slab in job.model.tables.journey.slabs]
    held = contents(job)
    for slab, touched in zip(job.model.tables.journey.slabs, noted, strict=True):
        slab.touched = touched
    return held


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_change_without_a_step_are_in_the_next_increment(tmp_path: Path, ranks: int) -> None:
    answers = run_ranks(ranks, write_behind_the_steps, str(tmp_path))
    names = [(name, small) for name, small, _ in answers[0]]
    # All at step 0, so each takes the place of the one before, but for the full one that they stand on.
    assert names == [
        ("step-0000000000", False),
        *((f"step-0000000000.{n}", True) for n in (1, 2, 3, 4)),
        ("step-0000000000.5", False),
    ]
    equal(load_alone(tmp_path)[1], [answer[-1][2] for answer in answers])
    assert [path.name for _, path in se.checkpoints(tmp_path)] == ["step-0000000000.5"]


def lose_an_increments_full(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    train(job, rank, world_size, range(1))
    full = job.save(folder, incremental=True)
    train(job, rank, world_size, range(1, 2))
    job.save(folder, incremental=True)
    se.Comm.of().all_reduce("test: all have saved", torch.zeros(1))
    if rank == 0:
        shutil.rmtree(full)
    se.Comm.of().all_reduce("test: it is gone", torch.zeros(1))
    message = raised(lambda: job.load(folder))
    train(job, rank, world_size, range(2, 3))
    return message, read_manifest(job.save(folder, incremental=True)).base is None


def test_an_increment_without_its_full_checkpoint_says_so_and_the_next_one_is_full(tmp_path: Path) -> None:
    answers = run_ranks(2, lose_an_increments_full, str(tmp_path))
    for message, full in answers:
        assert "step-0000000002 holds changes since step-0000000001, which cannot be read" in message
        assert full


def fail_between(rank: int, world_size: int, folder: str) -> Any:
    job = built(world_size, "Adam", turn=0)
    train(job, rank, world_size, range(1))
    job.save(folder, incremental=True)
    train(job, rank, world_size, range(1, 2))
    with small_files(rank == 0):
        raised(lambda: job.save(folder))  # a full one, which would have made the rows of step 2 old
    train(job, rank, world_size, range(2, 3))
    path = job.save(folder, incremental=True)
    return read_manifest(path).base is not None, contents(job)


def test_a_full_save_that_fails_forgets_no_row(tmp_path: Path) -> None:
    answers = run_ranks(2, fail_between, str(tmp_path))
    assert [small for small, _ in answers] == [True, True]
    equal(load_alone(tmp_path)[1], [held for _, held in answers])
