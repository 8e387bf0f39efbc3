"""Sending ids ahead: the same numbers as without, and a ticket good for one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import shardembed as se
from shardembed.errors import IdRangeError, StepError
from tests.harness import run_ranks

TABLES = [
    se.TableConfig("a", 20, 4, dtype=torch.float64, max_norm=1.5),
    se.TableConfig("b", 9, 4, pooling=None, dtype=torch.float64),
]
PLAN: dict[str, Any] = {"a": se.column_wise(), "b": se.row_wise()}


def batch_of(rank: int, step: int) -> dict[str, torch.Tensor]:
    seed = torch.Generator().manual_seed(10 * step + rank)
    return {"a": torch.randint(20, (3 + rank, 2), generator=seed), "b": torch.randint(9, (4,), generator=seed)}


def train(rank: int, world_size: int, ahead: bool, deterministic: bool) -> list[torch.Tensor]:
    """The tables after four steps; `ahead` sends each batch's ids before the step on the one before."""
    emb = se.EmbeddingCollection(TABLES, optimizer=se.optim.Adagrad(lr=0.5), plan=PLAN, deterministic=deterministic)
    opt = se.Optimizer(emb)
    coming: Any = emb.prefetch(batch_of(rank, 0)) if ahead else batch_of(rank, 0)
    for step in range(4):
        now = coming
        coming = emb.prefetch(batch_of(rank, step + 1)) if ahead else batch_of(rank, step + 1)
        torch.stack([output.square().sum() for output in emb(now).values()]).sum().backward()
        opt.step()
    return [emb.rows(table.name, torch.arange(table.num_embeddings)) for table in TABLES]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_ids_sent_ahead_meet_the_rows_of_the_call(world_size: int, deterministic: bool) -> None:
    ahead, usual = (run_ranks(world_size, train, way, deterministic)[0] for way in (True, False))
    for one, other in zip(ahead, usual, strict=True):
        assert torch.equal(one, other)


def use_twice(rank: int, world_size: int) -> tuple[str, str]:
    emb = se.EmbeddingCollection(TABLES, optimizer=se.optim.SGD(), plan=PLAN)
    emb.prefetch(batch_of(rank, 7))  # dropped
    ticket = emb.prefetch(batch_of(rank, 0))
    emb(ticket)
    with pytest.raises(StepError) as again:
        emb(ticket)
    bad = {"a": torch.tensor([[99 if rank == 0 else 1]]), "b": torch.tensor([1])}
    with pytest.raises(IdRangeError) as wrong:
        emb.prefetch(bad)
    emb(batch_of(rank, 1))  # the ranks are still in step
    return str(again.value), str(wrong.value)


def test_a_ticket_is_good_for_one_call() -> None:
    for again, wrong in run_ranks(2, use_twice):
        assert again == "the ticket for a, b has been used; a ticket is good for one call, so prefetch again"
        assert wrong.startswith("rank 0: table 'a', feature 'a': id 99 at position 0")
