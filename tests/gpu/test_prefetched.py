"""`prefetched` on a GPU: what a stream of its own sends ahead is there when it is looked up, and nothing is reused too early."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

import shardembed as se

TABLES = [se.TableConfig("a", 5000, 32), se.TableConfig("b", 3000, 32, pooling=None)]


def batch_of(step: int, device: str) -> dict[str, torch.Tensor]:
    seed = torch.Generator().manual_seed(step)
    return {name: torch.randint(3000, (256, 8), generator=seed).to(device) for name in ("a", "b")}


def train(device: str, loop: Callable[[Iterable[Any], se.EmbeddingCollection], Iterable[Any]]) -> list[torch.Tensor]:
    emb = se.EmbeddingCollection(TABLES, optimizer=se.optim.Adagrad(lr=0.1), deterministic=True)
    optimizer = se.Optimizer(emb)
    busy = torch.ones(2000, 2000, device="cuda")
    for batch in loop((batch_of(step, device) for step in range(8)), emb):
        for _ in range(20):  # so that the streams are far apart
            busy = (busy @ busy).clamp_(max=1.0)
        torch.stack([output.square().sum() for output in emb(batch).values()]).sum().backward()
        optimizer.step()
    return [emb.rows(table.name, torch.arange(table.num_embeddings)) for table in TABLES]


def test_tables_end_as_without_to_the_last_bit() -> None:
    for device in ("cpu", "cuda"):
        plain = train(device, lambda loader, emb: se.synced(loader))
        for depth in (1, 2):
            ahead = train(device, lambda loader, emb, depth=depth: se.prefetched(loader, emb, depth))
            assert all(torch.equal(one, other) for one, other in zip(ahead, plain, strict=True)), (device, depth)
