"""A checkpoint loads on any number of ranks, under any plan: the same bits, and training goes on with the same losses."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.amount import sampled
from tests.harness import run_ranks
from tests.ranks.saved import LAYOUTS, assembled, built, contents, train

STEPS, MORE = 3, 3


def save_at(rank: int, world_size: int, optimizer: str, turn: int, folder: str) -> Any:
    job = built(world_size, optimizer, turn)
    train(job, rank, world_size, range(STEPS))
    path = job.save(folder, progress={"next": STEPS})
    held = contents(job)
    return path.name, held, train(job, rank, world_size, range(STEPS, STEPS + MORE)), contents(job)


def load_at(rank: int, world_size: int, optimizer: str, turn: int, folder: str) -> Any:
    job = built(world_size, optimizer, turn)
    train(job, rank, world_size, range(100, 101))  # a model that has been elsewhere
    restored = job.load(folder)
    held = contents(job)
    start = restored.progress["next"]
    return restored, held, train(job, rank, world_size, range(start, start + MORE)), contents(job)


@pytest.mark.parametrize(("saved_by", "optimizer"), sampled(product([1, 2, 3, 4], ["SGD", "RowwiseAdagrad", "Adam"])))
def test_saved_here_and_loaded_elsewhere_everything_is_equal_bit_for_bit(tmp_path: Path, optimizer: str, saved_by: int) -> None:
    answers = run_ranks(saved_by, save_at, optimizer, saved_by, str(tmp_path))
    saved = assembled([held for _, held, _, _ in answers])
    after = assembled([held for _, _, _, held in answers])
    assert {name for name, *_ in answers} == {"step-0000000003"}
    for loaded_by in (1, 2, 3, 4):
        turn = saved_by if loaded_by == saved_by else loaded_by + 3 * saved_by  # every layout meets others; once, itself
        found = run_ranks(loaded_by, load_at, optimizer, turn, str(tmp_path))
        loaded = assembled([held for _, held, _, _ in found])
        assert loaded.keys() == saved.keys()
        for key, values in saved.items():
            assert np.array_equal(values, loaded[key], equal_nan=True), f"{key}, {saved_by} -> {loaded_by} ranks"
        restored = found[0][0]
        assert (restored.step, restored.world_size) == (STEPS, saved_by)
        assert restored.random == ("restored" if loaded_by == saved_by else "reseeded")
        assert found[0][2] == pytest.approx(answers[0][2], rel=1e-12)
        then = assembled([held for _, _, _, held in found])
        for key, values in after.items():
            if loaded_by == saved_by:
                assert np.array_equal(values, then[key]), f"{key} after more steps"
            else:
                np.testing.assert_allclose(then[key], values, rtol=1e-9, atol=1e-12, err_msg=key)


def test_every_pair_of_layouts_is_met() -> None:
    turns = {(a, b if b == a else b + 3 * a) for a in (1, 2, 3, 4) for b in (1, 2, 3, 4)}
    count = len(LAYOUTS)
    assert {(then - now) % count for now, then in turns} >= {0, 1, 2, 3, 4, 5, 6}
