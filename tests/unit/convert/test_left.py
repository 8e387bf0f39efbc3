"""What still refers to plain tables after shard(): it is made to refer to the sharded ones, or named."""

from __future__ import annotations

import warnings
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import shardembed as se
from shardembed.errors import StaleReferenceWarning, UnsupportedError

Fields = namedtuple("Fields", ["first", "second"])


class Listed(nn.Module):
    """Tables in lists, as programs for many fields hold them, beside the names by which torch knows them."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(7, 3), nn.Embedding(7, 3)
        self.tables = [self.e, self.f]
        self.by_name = {"e": (self.e, 3), "rest": [{"f": self.f}]}
        self.pair = Fields(self.e, self.f)
        object.__setattr__(self, "alone", self.f)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return sum((table(ids) for table in self.tables), self.alone(ids) + self.pair.second(ids)).sum()


def sharded(model: nn.Module, **settings: Any) -> nn.Module:
    settings.setdefault("optimizer", se.optim.SGD(lr=1.0))
    return se.shard(model, verbose=False, **settings)


def test_attributes_that_hold_tables_hold_the_sharded_ones() -> None:
    torch.manual_seed(0)
    plain = Listed()
    torch.manual_seed(0)
    model = Listed()
    kept = model.tables
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharded(model)
    assert model.tables is kept, "another list"
    assert model.tables == [model.e, model.f]
    assert model.by_name == {"e": (model.e, 3), "rest": [{"f": model.f}]}
    assert model.pair == Fields(model.e, model.f)
    assert model.alone is model.f
    ids = torch.tensor([1, 2, 2])
    optimizer, theirs = se.Optimizer(model), torch.optim.SGD(plain.parameters(), lr=1.0)
    for one, stepped in ((model, optimizer), (plain, theirs)):
        one(ids).backward()
        stepped.step()
    torch.testing.assert_close(model.f.rows("f", torch.arange(7)), plain.f.weight.detach())


class Penalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.e, self.f = nn.Embedding(7, 3), nn.EmbeddingBag(7, 3)
        self.inner = nn.Module()
        self.inner.regularised = [("l2", [self.e.weight]), ("l1", {"f": self.f.weight})]


def test_lists_of_weights_are_named() -> None:
    model = Penalised()
    with pytest.warns(StaleReferenceWarning) as said:
        sharded(model)
    text = str(said[0].message)
    assert "model.inner.regularised[0][1][0] (of 'e'); model.inner.regularised[1][1]['f'] (of 'f')" in text, text
    assert len(said) == 1


def test_optimizers_functions_and_other_modules_are_named() -> None:
    model, other = Penalised(), nn.Module()
    model.inner.regularised = []
    optimizer = torch.optim.Adagrad(model.parameters())
    other.read, other.weights = model.e, [model.f.weight]
    weights = list(model.parameters())

    def penalty() -> torch.Tensor:
        return sum((weight.square().sum() for weight in weights), torch.zeros(()))

    with pytest.warns(StaleReferenceWarning) as said:
        sharded(model)
    text = str(said[0].message)
    for place in (
        "the optimizer Adagrad (of 'e', 'f')",
        "'weights' of the function test_optimizers_functions_and_other_modules_are_named.<locals>.penalty[0] (of 'e')",
        "Module.read (of 'e')",
        "Module.weights[0] (of 'f')",
    ):
        assert place in text, text
    assert penalty().requires_grad
    assert optimizer.param_groups


def test_a_model_without_such_references_is_not_warned_of() -> None:
    model = Penalised()
    model.inner.regularised = [nn.Linear(3, 1).weight]
    kept = model.e  # a variable is nobody's list
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sharded(model)
    assert type(kept) is nn.Embedding


def test_an_average_of_other_weights_is_refused() -> None:
    """Made before shard(), it would pair the table with the first dense weight that there is now."""
    model = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 3))
    average = AveragedModel(model)
    sharded(model)
    before = [parameter.clone() for parameter in average.module.parameters()]
    with pytest.raises(UnsupportedError, match=r"AveragedModel pairs Parameters by their place.*Embedding\(7, 3"):
        average.update_parameters(model)
    assert all(torch.equal(one, other) for one, other in zip(average.module.parameters(), before, strict=True))
    dense = AveragedModel(model[1])
    dense.update_parameters(model[1])
    whole = nn.Sequential(nn.Embedding(7, 3))
    average = AveragedModel(whole)
    with torch.no_grad():
        sharded(whole, optimizer=None)[0].weight.fill_(2.0)
    average.update_parameters(whole)
    assert average.module[0].weight.eq(2).all()
