"""The two communicators that carry tensors of GPUs: made at the start, by all ranks or none, and called in one order."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm import comm as comms
from shardembed.comm import communicators, rendezvous
from shardembed.comm.comm import Comm
from shardembed.errors import CollectiveError, InputError
from tests.harness import run_ranks
from tests.ranks.as_on_gpus import CPU, two_communicators

TABLES = [
    se.TableConfig("a", 30, 4, feature_names=["a", "a list"], pooling={"a": "sum", "a list": None}),
    se.TableConfig("b", 17, 4, pooling="mean"),
    se.TableConfig("c", 9, 6),
]
PLAN = {"a": se.row_wise(), "b": se.column_wise(), "c": se.replicated()}
STEPS = 4


def batch_of(rank: int, step: int) -> dict[str, torch.Tensor]:
    seed = torch.Generator().manual_seed(100 * step + rank)
    rows = {"a": 30, "a list": 30, "b": 17, "c": 9}
    return {name: torch.randint(count, (2 + rank + step % 2, 3), generator=seed) for name, count in rows.items()}


def late(batches: Iterable[Any], rank: int) -> Iterable[Any]:
    """With pauses that differ between ranks, so that threads come to their calls in different orders."""
    pauses = random.Random(rank)
    for batch in batches:
        time.sleep(pauses.random() / 20)
        yield batch


def train(rank: int, group: dist.ProcessGroup | None, depth: int) -> list[torch.Tensor]:
    """Tables after some steps, with all else that a loop may do between them. depth: 0 for the plain loop."""
    emb = se.EmbeddingCollection(TABLES, optimizer=se.optim.RowwiseAdagrad(lr=0.3), plan=PLAN, process_group=group)
    optimizer = se.Optimizer(emb, on_nonfinite="raise")
    loader = late([batch_of(rank, step) for step in range(STEPS + rank)], rank)
    for batch in se.prefetched(loader, emb, depth) if depth else se.synced(loader, Comm.of(group)):
        torch.stack([output.square().sum() for output in emb(batch).values()]).sum().backward()
        se.clip_grad_norm_(emb, 10.0)
        optimizer.step()
        with torch.no_grad():
            inner = [batch_of(rank, 50)] * 2
            for ticket in se.prefetched(late(inner, rank), emb, 1) if depth else inner:
                emb(ticket)
        emb.topk(torch.ones(rank + 1, 4), 2, "b")
    return [emb.rows(table.name, torch.arange(table.num_embeddings)) for table in TABLES]


def trained(rank: int, world_size: int) -> tuple[list[int], list[list[str]]]:
    """Depths that end in other bits than without communicators, and what these carried, by depth."""
    plain = train(rank, None, 0)
    different, orders = [], []
    for depth in (0, 1, 2):
        with two_communicators(world_size) as (group, carried):
            found = train(rank, group, depth)
        different += [] if all(map(torch.equal, found, plain)) else [depth]
        orders.append(carried)
    return different, orders


def test_all_that_travels_keeps_the_order_of_the_program_and_has_the_bits_of_the_plain_loop() -> None:
    answers = run_ranks(2, trained)
    assert [different for different, _ in answers] == [[], []]
    for orders in zip(*(orders for _, orders in answers), strict=True):
        assert orders[0] == orders[1]  # else ranks wait for each other in NCCL
        assert {line.split(":")[0] for line in orders[0]} == {"MainThread"}
        assert {line.split()[1] for line in orders[0]} == {"forward", "backward", "step", "control"}


def groups_made(rank: int, world_size: int) -> list[str]:
    """The backends of the process groups that all of a training makes, beside those of the host."""
    made = []

    def seen(ranks: list[int], timeout: float, watched: Any, backend: str | None) -> Any:
        made.append(str(backend))
        return rendezvous.new_group(ranks, timeout, watched, backend)

    with mock.patch.object(communicators, "new_group", seen), two_communicators(world_size) as (group, _):
        train(rank, group, 2)
        train(rank, group, 1)
    return made


def test_two_are_made_whatever_is_trained() -> None:
    assert run_ranks(2, groups_made) == [["gloo"] * 2] * 2


def refused(rank: int, world_size: int) -> list[str]:
    """A batch that one rank refuses, and then one that is fine, ahead; the loop is left early after that."""
    heard = []
    with two_communicators(world_size) as (group, _):
        emb = se.EmbeddingCollection(TABLES, plan=PLAN, process_group=group)
        wrong = batch_of(rank, 0) | ({"b": torch.tensor([[17]])} if rank == 1 else {})
        for batches in ([batch_of(rank, 0), wrong, batch_of(rank, 1)], [batch_of(rank, 2)] * 3):
            try:
                for number, batch in enumerate(se.prefetched(batches, emb, depth=2)):
                    emb(batch)
                    if number == 1:
                        break
            except InputError as error:
                heard.append(str(error))
        emb(batch_of(rank, 3))
    return heard


def test_a_refused_batch_is_told_on_all_ranks_and_the_next_loop_works() -> None:
    answers = run_ranks(2, refused)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 1
    assert answers[0][0].startswith("rank 1: table 'b', feature 'b': id 17")


def cannot_connect(rank: int, world_size: int, how: str) -> str:
    """What is said where the first calls of rank 1 do not work."""
    group = dist.new_group(list(range(world_size)))
    assert isinstance(group, dist.ProcessGroup)
    comm = Comm.of(group, timeout=8.0)
    real = communicators._warm_up

    def broken(*args: Any) -> None:
        if rank == 1 and how == "fails":
            raise RuntimeError("no route to host\nand so on")
        if rank == 1:
            time.sleep(60.0)
        real(*args)

    with mock.patch.object(communicators, "_warm_up", broken), pytest.raises(CollectiveError) as caught:
        comm.connect(CPU, "gloo")
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "cause"), [("fails", "no route to host"), ("hangs", "the first calls were not through after 4.0 s")]
)
def test_ranks_that_cannot_connect_hear_it_together_at_the_start(how: str, cause: str) -> None:
    answers = run_ranks(2, cannot_connect, how, fresh_ranks=True)
    for said in answers:
        assert said.startswith("the GLOO communicators of 2 ranks could not be made: rank ")
        assert "rank 1, after " in said
        assert cause in said


def share_a_gpu(rank: int, world_size: int) -> tuple[str, list[str]]:
    """What is said where both ranks have the same device, and what was made by then."""
    group = dist.new_group(list(range(world_size)))
    assert isinstance(group, dist.ProcessGroup)
    comm, made = Comm.of(group, timeout=60.0), list[str]()

    def never(*args: Any) -> None:
        made.append("communicators")

    with (
        mock.patch.object(comms, "identity", return_value="one-and-the-same"),
        mock.patch.object(comms, "open_communicators", never),
        pytest.raises(CollectiveError) as caught,
    ):
        comm.connect(CPU, "gloo")
    return str(caught.value), made


def test_ranks_that_share_a_gpu_hear_it_together_before_anything_is_made() -> None:
    (said, made), other = run_ranks(2, share_a_gpu, fresh_ranks=True)
    assert other == (said, made)
    assert said.startswith("ranks [0, 1] share the GPU one-and-the-same, and NCCL takes one rank a GPU (rank 0 has cpu of ")
    assert made == []
