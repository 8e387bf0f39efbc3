"""From a job of several ranks to one process without a group: what `unshard` gives there, `load_plain` reads here, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.cli import main
from tests.harness import run_ranks

USERS, ITEMS, TAGS = 40, 31, 7
Plan = dict[str, se.Placement]
PLANS: dict[str, Callable[[], Plan]] = {
    "rows and columns": lambda: {"user": se.row_wise(strided=False), "item": se.column_wise(), "tags": se.replicated()},
    "dealt rows and a grid": lambda: {"user": se.row_wise(), "item": se.grid(2), "tags": se.table_wise(0)},
}


class Recommender(nn.Module):
    """Two towers that share nothing but a head with statistics."""

    def __init__(self, users: int = USERS, items: int = ITEMS) -> None:
        super().__init__()
        self.user = nn.Embedding(users, 6)
        self.item = nn.EmbeddingBag(items, 6, mode="sum")
        self.tags = nn.Embedding(TAGS, 6, dtype=torch.float64)
        self.head = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))

    def forward(self, user: torch.Tensor, item: torch.Tensor, tag: torch.Tensor) -> torch.Tensor:
        return self.head(self.user(user) * self.item(item) + self.tags(tag).float())


def train_and_save(rank: int, world_size: int, folder: str, plan: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    model = se.shard(Recommender(), optimizer=se.optim.Adam(lr=0.1), plan=PLANS[plan]())
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = se.Optimizer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(3):
        ids = torch.arange(4) * 3 + step + 5 * rank
        functional.softplus(wrapped(ids % USERS, (ids % ITEMS).unsqueeze(1), ids % TAGS)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step != 1:  # the first save is of everything, the second of the rows that have changed since
            se.save_checkpoint(folder, wrapped, optimizer=optimizer, incremental=True)
    return {key: value.detach() for key, value in se.unshard(model).state_dict().items()}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_trained_model_serves_without_its_job(tmp_path: Path, plan: str, ranks: int, capsys: pytest.CaptureFixture[str]) -> None:
    trained = run_ranks(ranks, train_and_save, str(tmp_path), plan)[0]
    assert [path.name for _, path in se.checkpoints(tmp_path)] == ["step-0000000001", "step-0000000003"]
    with torch.device("meta"):
        whole = Recommender()
    assert se.load_plain(tmp_path, whole) == {}
    found = whole.state_dict()
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[key], trained[key]) for key in trained)

    some = Recommender(users=3, items=2)
    maps = se.load_plain(tmp_path, some, rows={"user": [39, 0, 11], "item": torch.tensor([30, 4])})
    asked = torch.tensor([11, 39, 11]), torch.tensor([[4], [30], [4]]), torch.tensor([0, 1, 6])
    expected = whole.eval()(*asked)
    assert torch.equal(some.eval()(maps["user"](asked[0]), maps["item"](asked[1]), asked[2]), expected)

    assert main(["inspect", str(tmp_path), "--verify"]) == 0
    shown = capsys.readouterr().out
    assert "changes since step-0000000001" in shown
    assert f"plan for {ranks} rank" in shown
    assert "in 2 checkpoints hashed, all as it was saved" in shown
