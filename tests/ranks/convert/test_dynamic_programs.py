"""A program that others wrote, fed with hashes as ids: Torch-RecHub's trainer and AFM, whose tables `se.shard` makes dynamic."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import shardembed as se
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.convert.test_other_programs import needed, ready

ODD = 0x5DEECE66D1CE4E5B  # times a small number, cut to 63 bits: any other for each
TABLES = {"user": 100, "item": 50}


def hashed(ids: np.ndarray) -> np.ndarray:
    """Numbers of 63 bits in place of small ones, but for 0, which stands for nothing in a history."""
    return ((ids.astype(np.uint64) * np.uint64(ODD)) & np.uint64(2**63 - 1)).astype(np.int64)


def hashes(count: int) -> torch.Tensor:
    return torch.from_numpy(hashed(np.arange(count)))


def train(
    rank: int, world_size: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor], list[int]]:
    """Rows of all ids before and after, dense weights, and how many ids live in each table."""
    with ready(torch.float32):
        module = importlib.import_module("rechub_loop")
        given = module.data()
        raw = {name: hashed(values) for name, values in given.x.items()}
        model = module.build()
        for feature in model.fm_features:
            vars(feature).pop("embed", None)
        settings: dict[str, Any] = {"dynamic": {"*": se.Dynamic()}, "capacity": {"*": None}, "fresh": ["*"], "plan": se.row_wise()}
        se.shard(model, optimizer=se.optim.SGD(lr=module.TABLES_LR), verbose=False, **settings)
        tables = {name: model.embedding.embed_dict[name] for name in TABLES}
        before = {name: table.rows(hashes(TABLES[name])) for name, table in tables.items()}

        def both(parameters: Any, **options: Any) -> se.Optimizer:
            return se.Optimizer(model, dense=torch.optim.SGD(parameters, **options))

        trainer = module.CTRTrainer(model, optimizer_fn=both, optimizer_params={"lr": module.DENSE_LR})
        module.average_before_steps(trainer.optimizer, model)
        with mock.patch.object(module, "data", return_value=type(given)(raw, given.y)):
            module.train(trainer)
        after = {name: table.rows(hashes(TABLES[name])) for name, table in tables.items()}
        dense = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return before, after, dense, [table.tally().live for table in tables.values()]


@pytest.mark.parametrize("world_size", [1, exhaustive(2)])
def test_a_recommender_learns_hashes_as_its_plain_twin_learns_numbers(world_size: int) -> None:
    needed("rechub_loop")
    before, after, dense, live = run_ranks(world_size, train)[0]
    with ready(torch.float32):
        module = importlib.import_module("rechub_loop")
        start = module.build()
        for name, rows in before.items():
            start.embedding.embed_dict[name].weight.data.copy_(rows)
        with mock.patch.object(module, "build", return_value=start):
            plain = module.train_plain()
        met = module.data().x
    close = {"rtol": 1e-4, "atol": 1e-5}
    for name, rows in after.items():
        torch.testing.assert_close(rows, plain.embedding.embed_dict[name].weight.detach(), **close)
        assert not torch.allclose(rows, before[name], atol=1e-3), f"{name} was not trained"
    weights = dict(plain.named_parameters())
    for name, weight in dense.items():
        torch.testing.assert_close(weight, weights[name].detach(), **close)
    items = np.union1d(met["item"], met["history"])
    assert live[0] == len(np.unique(met["user"]))
    assert live[1] == len(items)
