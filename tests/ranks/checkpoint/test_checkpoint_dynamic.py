"""Checkpoints of dynamic tables: from any ranks and plan to any other, and on as if nobody had saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import shardembed as se
from tests.harness import run_ranks
from tests.ranks.living import Held, batch_of, built, contents, equal, train


def save_and_go_on(rank: int, world_size: int, folder: str, optimizer: str, deterministic: bool) -> tuple[Held, Held]:
    job = built(world_size, 1, optimizer=optimizer, deterministic=deterministic)
    train(job, rank, world_size, range(5))
    job.save(folder)
    saved = contents(job)
    train(job, rank, world_size, range(5, 10))
    return saved, contents(job)


def load_and_go_on(rank: int, world_size: int, folder: str, turn: int, optimizer: str, deterministic: bool) -> tuple[Held, Held]:
    job = built(world_size, turn, optimizer=optimizer, deterministic=deterministic)
    job.load(folder)
    loaded = contents(job)
    train(job, rank, world_size, range(5, 10))
    return loaded, contents(job)


@pytest.mark.parametrize("optimizer", ["Adam", "RowwiseAdagrad"])
@pytest.mark.parametrize(("savers", "loaders"), [(3, 2), (1, 3), (2, 1)])
def test_a_loaded_table_goes_on_as_one_never_saved(tmp_path: Path, savers: int, loaders: int, optimizer: str) -> None:
    one = run_ranks(savers, save_and_go_on, str(tmp_path), optimizer, True)
    other = run_ranks(loaders, load_and_go_on, str(tmp_path), 3, optimizer, True)
    equal([loaded for loaded, _ in other], [saved for saved, _ in one])
    equal([after for _, after in other], [after for _, after in one])
