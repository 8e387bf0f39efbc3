"""The examples in other people's loops: on two ranks each ends with the weights of plain training in one process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

import shardembed as se
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("example", NEEDS)
def test_an_example_ends_with_the_weights_of_plain_training(example: str, tmp_path: Path) -> None:
    package = NEEDS[example]
    if package and not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed: pip install {package}")
    run_ranks(2, train, example, str(tmp_path), timeout=180.0, fresh_ranks=package is not None)
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
