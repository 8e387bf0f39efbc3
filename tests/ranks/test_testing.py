"""se.testing.compare: finds nothing where there is nothing, and names what differs first where something does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed import testing
from shardembed.errors import ConfigError
from tests.harness import run_ranks
from tests.ranks.beside import F64, ITEMS, USERS, Towers, batches

ROOT = Path(__file__).parents[2]
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}
PLAN = {"user": se.row_wise(), "towers.item": se.column_wise()}


class Scored(Towers):
    """Returns its loss; with `broken`, what only a sharded model does."""

    def __init__(self, broken: str = "", **settings: Any) -> None:
        super().__init__(**settings)
        self.broken = broken

    def forward(self, user: torch.Tensor, item: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        sharded = not isinstance(self.user, nn.Embedding)
        output = super().forward(user, item)
        if sharded and self.broken == "output":
            output = output + 1
        if sharded and self.broken == "gradient":  # of items only
            more = self.towers["item"](item[:, :1]).sum(1, keepdim=True)
            output = output + more - more.detach()
        if sharded and self.broken == "weights":
            self.user.reset_parameters()
        return nn.functional.mse_loss(output, label)


def broken_output() -> nn.Module:
    return Scored("output")


def broken_gradient() -> nn.Module:
    return Scored("gradient")


def broken_weights() -> nn.Module:
    return Scored("weights")


class Bare(nn.Module):
    """No dense parameters, an output for a loss to judge, and keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(USERS, 3, dtype=F64)
        self.other = nn.EmbeddingBag(ITEMS, 3, mode="max", dtype=F64)

    def forward(self, user: torch.Tensor, item: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": self.user(user), "item": self.other(item)}


def judged(output: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (output["user"] * output["item"]).square().mean()


def named_batches() -> list[dict[str, torch.Tensor]]:
    return [{"user": user, "item": item} for user, item, _ in batches(2)]


def announced(user: torch.Tensor, item: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"user": user, "towers.item": item}


def on_this_rank(rank: int, world_size: int, job: Any, shares: list[list[Any]]) -> list[torch.Tensor]:
    return list(testing._sharded(job, shares[rank]))


@pytest.fixture
def pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that run already, instead of new ones each time."""
    monkeypatch.setattr(testing, "_spawn", lambda ranks, job, shares: run_ranks(ranks, on_this_rank, job, shares))


def test_a_model_that_returns_its_loss_agrees() -> None:
    """On ranks that are started for it, as a user's are."""
    optimizer = {"user": se.optim.Adam(lr=0.1), "*": se.optim.Adagrad(lr=0.1)}
    report = se.testing.compare(Scored, batches(2), plan=PLAN, optimizer=optimizer, inputs=announced, **TIGHT)
    assert report, report.text
    assert str(report) == "all agree: 2 step(s), 18 tensors, unsharded and on 2 rank(s)"


@pytest.mark.usefixtures("pooled")
def test_a_model_without_dense_parameters_agrees_by_its_loss_and_keywords() -> None:
    report = se.testing.compare(Bare, named_batches(), 3, loss=judged, optimizer=se.optim.SGD(lr=0.5), **TIGHT)
    assert report, report.text


@pytest.mark.usefixtures("pooled")
@pytest.mark.parametrize(
    ("build", "stage", "text"),
    [
        (broken_output, "output in step 0", r"[\d.]+ sharded, [\d.]+ unsharded"),
        (
            broken_gradient,
            "gradient of towers.item in step 0",
            r"\d+ of 17 rows differ, \[\d+, .*\] and more; by [\d.e-]+ at \[\d+, \d\]",
        ),
        (broken_weights, "weights of user after step 0", "23 of 23 rows differ"),
    ],
)
def test_the_first_difference_is_named(build: Any, stage: str, text: str) -> None:
    report = se.testing.compare(build, batches(2), plan=PLAN, **TIGHT)
    assert not report
    assert report.stage == stage
    assert re.match(f"{stage}: {text}", report.text), report.text


def test_what_cannot_be_compared_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"batch 0: \(12,\) cannot be cut into 5 equal parts"):
        se.testing.compare(Scored, batches(1), ranks=5)
    with pytest.raises(ConfigError, match=r"table 'user': FTRL has no counterpart in torch.optim"):
        se.testing.compare(Scored, batches(1), optimizer=se.optim.FTRL())
    with pytest.raises(ConfigError, match="define it at the top of a module"):
        se.testing.compare(lambda: Scored(), batches(1))


class Collected(nn.Module):
    """One module with two tables, TorchRec's."""

    def __init__(self) -> None:
        super().__init__()
        from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

        configs = [EmbeddingBagConfig(name=name, num_embeddings=9, embedding_dim=4, feature_names=[name]) for name in ("a", "b")]
        self.ebc = EmbeddingBagCollection(configs)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        from torchrec import KeyedJaggedTensor

        lengths = torch.ones(ids.numel(), dtype=torch.int64)
        return self.ebc(KeyedJaggedTensor.from_lengths_sync(["b", "a"], ids.t().reshape(-1), lengths)).values().square().mean()


@pytest.mark.usefixtures("pooled")
def test_a_collection_of_torchrecs_is_compared_table_by_table() -> None:
    pytest.importorskip("torchrec")
    batch = torch.randint(0, 9, (6, 2), generator=torch.Generator().manual_seed(0))
    report = se.testing.compare(Collected, [batch, batch], plan={"ebc.a": se.row_wise(), "ebc.b": se.column_wise()})
    assert report, str(report)
    assert "10 tensors" in str(report)  # a step: the loss, two gradients, two tables
