"""The examples in other people's loops: on two ranks each ends with the weights of plain training in one process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.errors import StepError
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.convert.test_compose import whole_state
from tests.ranks.models import Batch, Towers, batches, differences, part, seeded, weights_of

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
NEEDS = {"ddp_loop": None, "lightning_loop": "lightning", "accelerate_loop": "accelerate"}


@contextmanager
def importable(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """The examples import each other as scripts do. In float64, so that an order of summation explains nothing."""
    torch.set_default_dtype(dtype)
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield
    finally:
        sys.path.remove(str(EXAMPLES))
        torch.set_default_dtype(torch.float32)


def train(
    rank: int, world_size: int, example: str, folder: str, function: str = "main", dtype: torch.dtype = torch.float64
) -> None:
    # What torchrun says; the process group is there already.
    said = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    others = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}
    with importable(dtype), mock.patch.dict(os.environ, {**{name: str(value) for name, value in said.items()}, **others}):
        getattr(importlib.import_module(example), function)(folder)


def accelerated(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Tables with torch's optimizer, prepared by Accelerate, which is told nothing."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    with mock.patch.dict(os.environ, {name: str(value) for name, value in said.items()}):
        accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
        model = se.shard(seeded(Towers), plan=se.row_wise(), verbose=False)
        wrapped, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=0.05))
    assert isinstance(wrapped, DistributedDataParallel), "Accelerate has wrapped nothing"
    steps = [part(batch, rank, world_size) for batch in batches(3)]
    trained_by(wrapped, optimizer, accelerator.backward, steps)
    nn.functional.mse_loss(wrapped(*steps[0][:2]), steps[0][2]).backward()
    with pytest.raises(StepError, match=r"Use se\.clip_grad_norm_"):
        accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
    return whole_state(model)


def trained_by(model: nn.Module, optimizer: Any, backward: Callable[[torch.Tensor], None], steps: list[Batch]) -> None:
    for user, item, label in steps:
        backward(nn.functional.mse_loss(model(user, item), label))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.exhaustive
def test_accelerate_leaves_shards_alone() -> None:
    pytest.importorskip("accelerate")
    plain = seeded(Towers)
    trained_by(plain, torch.optim.Adam(plain.parameters(), lr=0.05), torch.Tensor.backward, batches(3))
    for found in run_ranks(2, accelerated, fresh_ranks=True):
        assert differences(found, weights_of(plain)) == []


@pytest.mark.parametrize("example", [exhaustive(name) if needed else name for name, needed in NEEDS.items()])
def test_an_example_ends_with_the_weights_of_plain_training(example: str, tmp_path: Path) -> None:
    package = NEEDS[example]
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed: pip install {package}")
    run_ranks(2, train, example, str(tmp_path), fresh_ranks=package is not None)
    with importable():
        two_tower = importlib.import_module("two_tower")
        plain, trained = two_tower.train_plain(), two_tower.TwoTower()
        untrained = two_tower.build().state_dict()
        se.load_plain(tmp_path, trained)
    for name, weights in plain.state_dict().items():
        torch.testing.assert_close(
            trained.state_dict()[name], weights, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}"
        )
        assert not torch.allclose(weights, untrained[name], atol=1e-3), f"{name} was not trained"
    assert [step for step, _ in se.checkpoints(tmp_path)] == [16, 32]
