"""`se.train` as a rank of a job: again and again on the group that is there, with what one process finds."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import shardembed as se
from shardembed.errors import ConfigError, DataError
from tests.harness import run_ranks
from tests.unit.recipes.test_from_python import JOB


def twice(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    group = dist.group.WORLD if dist.is_initialized() else None
    job = {**copy.deepcopy(JOB), "run_dir": folder}
    runs = [se.train(job, settings={"train.seed": seed}, quiet=True) for seed in (1, 2)]
    errors = []
    for wrong, kind in (({"train": {"epochs": 0}}, ConfigError), ({"data": {"path": "nowhere.csv"}}, DataError)):
        with pytest.raises(kind) as error:
            se.train({**job, **wrong}, quiet=True)
        errors.append(str(error.value))
    assert (dist.group.WORLD if dist.is_initialized() else None) is group, "the group that was there stays"
    return {
        "folders": [str(run.folder) for run in runs],
        "losses": [run.losses for run in runs],
        "history": [run.history for run in runs],
        "errors": errors,
    }


def test_ranks_train_together_twice(tmp_path: Path) -> None:
    one, other = run_ranks(2, twice, str(tmp_path / "two"))
    assert one == other
    assert len(set(one["folders"])) == 2
    assert one["errors"][0].startswith("config['train']['epochs']: train.epochs should be greater than or equal to 1")
    (alone,) = run_ranks(1, twice, str(tmp_path / "one"))
    for name in ("losses", "history"):
        for mine, theirs in zip(alone[name], one[name], strict=True):
            for line, wanted in zip(mine, theirs, strict=True):
                assert line == pytest.approx(wanted, rel=1e-3)
