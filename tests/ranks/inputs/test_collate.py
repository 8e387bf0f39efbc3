"""Collated batches are looked up ahead of the loop, with the numbers of the plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import shardembed as se
from tests.harness import run_ranks


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, number: int) -> dict[str, Any]:
        films = [(number * step) % 50 for step in range(number % 4)]
        return {"user": number, "films": films, "stars": [1.0 + number] * len(films), "label": float(number % 2)}


class Likes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        tables = [se.TableConfig("user", 20, 4), se.TableConfig("film", 50, 4, ["films"])]
        self.emb = se.EmbeddingCollection(tables, optimizer=se.optim.Adagrad(lr=0.1), plan=se.row_wise())

    def forward(self, batch: se.Collated) -> torch.Tensor:
        found = self.emb(batch.ids)
        logits = (found["user"] * found["films"]).sum(1) + found["user"].sum(1)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch["label"].float())


def losses(rank: int, world_size: int, ahead: bool) -> list[float]:
    model = Likes()
    optimizer = se.Optimizer(model)
    collate = se.Collate(model.emb.features, weights={"films": "stars"})
    sampler = DistributedSampler(Samples(), world_size, rank, seed=3)
    loader = DataLoader(Samples(), 3, sampler=sampler, collate_fn=collate)
    batches = se.prefetched(loader, model, arguments=lambda batch: (batch.ids,)) if ahead else se.synced(loader)
    found = []
    for batch in batches:
        loss = model(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_collated_batches_are_sent_ahead_and_train_alike() -> None:
    plain, ahead = (run_ranks(2, losses, ahead) for ahead in (False, True))
    assert plain == ahead
    assert [len(found) for found in ahead] == [4, 4]
