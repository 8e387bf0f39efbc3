"""`prefetched`: the numbers of the plain loop to the last bit, whatever the plan and whatever comes between its batches."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shardembed as se
from shardembed.errors import UnusedBatchWarning
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.ranks.beside import Towers, batches, part, weights_of

STEPS = 5
TABLES = [
    se.TableConfig("a", 30, 4, feature_names=["a", "a list"], pooling={"a": "sum", "a list": None}),
    se.TableConfig("b", 17, 4, pooling="mean"),
]
NORMED = [se.TableConfig("a", 30, 4, max_norm=0.5), se.TableConfig("b", 17, 6)]


@dataclass(frozen=True)
class Case:
    """A plan, and how it is trained."""

    plan: Any
    tables: list[se.TableConfig] = field(default_factory=lambda: TABLES)
    optimizer: Any = field(default_factory=lambda: se.optim.RowwiseAdagrad(lr=0.3))
    every: int = 1  # batches a step
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "blocks of rows": Case(se.row_wise(strided=False)),
    "bags of rows": Case(se.row_wise(packing="bag")),
    "columns": Case(se.column_wise()),
    "whole tables": Case({"a": se.table_wise(0), "b": se.table_wise(0, packing="bag")}),
    "copies": Case(se.replicated()),
    "copies beside rows, several batches a step": Case({"a": se.replicated(), "b": se.row_wise()}, every=2),
    "an update in the backward": Case(se.row_wise(), settings={"update": "backward"}),
    "deterministic": Case({"a": se.column_wise(), "b": se.replicated()}, settings={"deterministic": True}),
    "norms of cut rows": Case(se.column_wise(), NORMED, se.optim.SGD(lr=0.3)),
}


def batch_of(rank: int, step: int, tables: list[se.TableConfig]) -> dict[str, torch.Tensor]:
    seed = torch.Generator().manual_seed(100 * step + rank)
    rows = {name: table.num_embeddings for table in tables for name in table.feature_names or [table.name]}
    return {name: torch.randint(count, (2 + rank + step % 2, 3), generator=seed) for name, count in rows.items()}


def train(rank: int, case: Case, loop: Callable[[list[Any], se.EmbeddingCollection], Iterable[Any]]) -> list[torch.Tensor]:
    """The tables after some steps over what `loop` makes of the batches."""
    emb = se.EmbeddingCollection(case.tables, optimizer=case.optimizer, plan=case.plan, **case.settings)
    optimizer = se.Optimizer(emb, micro_batches=case.every)
    loader = [batch_of(rank, step, case.tables) for step in range(STEPS + rank)]  # ranks have different numbers of them
    for number, batch in enumerate(loop(loader, emb)):
        torch.stack([output.square().sum() for output in emb(batch).values()]).sum().backward()
        if number % case.every == case.every - 1:
            optimizer.step()
    return [emb.rows(table.name, torch.arange(table.num_embeddings)) for table in case.tables]


def differing(rank: int, world_size: int) -> list[str]:
    """The cases and depths that end in other bits than the plain loop."""
    found = []
    for name, case in CASES.items():
        plain = train(rank, case, lambda loader, emb: se.synced(loader))
        for depth in (1, 2):
            ahead = train(rank, case, lambda loader, emb, depth=depth: se.prefetched(loader, emb, depth))
            if not all(torch.equal(one, other) for one, other in zip(ahead, plain, strict=True)):
                found.append(f"{name}, depth {depth}")
    return found


@pytest.mark.parametrize("world_size", [exhaustive(1), 2, exhaustive(3)])
def test_tables_end_as_without_to_the_last_bit(world_size: int) -> None:
    assert run_ranks(world_size, differing) == [[]] * world_size


def all_between(rank: int, world_size: int, folder: str) -> list[list[torch.Tensor]]:
    """The tables of a loop with everything else between its batches, ahead and plain."""

    def others(batch: Any, emb: se.EmbeddingCollection, number: int) -> None:
        with torch.no_grad():
            evaluated = list(se.prefetched([batch_of(rank, 50, TABLES)] * 2, emb, depth=2))
            assert [emb(ticket)["a"].shape for ticket in evaluated] == [(2 + rank, 4)] * 2
        emb.rows("a", torch.arange(rank + 1))
        emb.topk(torch.ones(rank, 4), 2, "b")
        if number == 1:
            se.save_checkpoint(folder, emb)
        if number == 2:
            se.load_checkpoint(folder, emb)
            se.EmbeddingCollection([se.TableConfig(f"t{i}", 9, 3 + i) for i in range(5)], plan=se.row_wise())  # longer counts

    def busy(ahead: bool) -> Callable[[list[Any], se.EmbeddingCollection], Iterator[Any]]:
        def loop(loader: list[Any], emb: se.EmbeddingCollection) -> Iterator[Any]:
            for number, batch in enumerate(se.prefetched(loader, emb, depth=2) if ahead else se.synced(loader)):
                others(batch, emb, number)
                yield batch

        return loop

    return [train(rank, CASES["blocks of rows"], busy(ahead)) for ahead in (True, False)]


def test_rows_retrieval_evaluation_checkpoints_and_new_collections_come_between(tmp_path: Path) -> None:
    for ahead, plain in run_ranks(2, all_between, str(tmp_path)):
        assert all(torch.equal(one, other) for one, other in zip(ahead, plain, strict=True))


# Converted models.


def shared(user: torch.Tensor, item: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"user": user, "towers.item": item}


class Whole(nn.Module):
    """Takes the batch as it is, and gives a model in it what it wants."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Any) -> torch.Tensor:
        user, item, label = batch
        return (self.inner(user, item=item) - label).square().mean()


def train_model(rank: int, world_size: int, ahead: bool) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Weights after training a converted model in DistributedDataParallel, and the all-to-alls of one more batch."""
    torch.manual_seed(0)
    model = Whole(se.shard(Towers(), inputs=shared, optimizer=se.optim.Adagrad(lr=0.1), plan=se.row_wise(), verbose=False))
    ddp = DistributedDataParallel(model) if world_size > 1 else model
    optimizer = se.Optimizer(model, dense=torch.optim.SGD(model.parameters(), lr=0.1))
    loader = [part(batch, rank, world_size) for batch in batches(4)]
    loop = se.prefetched(loader, ddp, arguments=lambda batch: batch[:2]) if ahead else se.synced(loader)
    comm = se.Comm.of()
    for number, batch in enumerate(loop):
        if number == 2:
            for tally in comm.tallies:
                tally.clear()
        ddp(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    calls = {stage: tally.calls[_, stage] for tally in comm.tallies for _, stage in tally.calls}
    return weights_of(se.unshard(model)), calls


@pytest.mark.parametrize("world_size", [1, exhaustive(2), 3])
def test_a_converted_model_finds_what_was_sent_for_it(world_size: int) -> None:
    ahead, plain = (run_ranks(world_size, train_model, way) for way in (True, False))
    for (weights, calls), (others, plainly) in zip(ahead, plain, strict=True):
        assert all(torch.equal(weights[name], others[name]) for name in others), "other weights"
        if world_size > 1:
            # Two of four batches, all of whose ids were sent once; and nobody but `synced` has to agree on the end.
            assert (calls["forward: send back"], calls["backward: send gradients"]) == (2, 2)
            assert "synced: agree on the end of data" in plainly
            assert "synced: agree on the end of data" not in calls


class Holder(nn.Module):
    """A model that holds a collection."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = se.EmbeddingCollection(TABLES, optimizer=se.optim.SGD(lr=0.1), plan=se.row_wise())

    def forward(self, batch: tuple[Any, torch.Tensor]) -> torch.Tensor:
        return torch.stack([output.sum() for output in self.emb(batch[0]).values()]).sum() * batch[1]


def held(rank: int, world_size: int) -> tuple[int, list[str], list[str]]:
    """How many calls four batches take, and what is said of a loop that uses them, and of one that uses copies."""
    model = Holder()
    loader = [(batch_of(rank, step, TABLES), torch.ones(())) for step in range(4)]
    comm = se.Comm.of()

    def said(change: Callable[[Any], Any]) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UnusedBatchWarning)
            for batch in se.prefetched(loader, model, arguments=lambda batch: batch[:1]):
                assert batch[1].shape == ()
                model(change(batch))
        return [str(one.message) for one in caught]

    before = sum(tally.totals()[0] for tally in comm.tallies)
    quiet = said(lambda batch: batch)
    sent = sum(tally.totals()[0] for tally in comm.tallies) - before
    return sent, quiet, said(lambda batch: ({name: ids.clone() for name, ids in batch[0].items()}, batch[1]))


def test_a_model_that_holds_a_collection_is_told_and_copies_are_noticed() -> None:
    for sent, quiet, said in run_ranks(2, held):
        assert sent == 4 * 3 + 3  # three a batch; the end of data: counts, and two for texts
        assert quiet == []
        assert len(said) == 1
        assert said[0].startswith("the model was not called with any of the first 3 batches of prefetched()")


def refusals(rank: int, world_size: int) -> list[str]:
    emb = se.EmbeddingCollection(TABLES, plan=se.row_wise())
    plain = se.shard(Towers(), optimizer=se.optim.SGD(), plan=se.row_wise(), verbose=False)
    models = [nn.Linear(1, 1), plain, Holder(), nn.ModuleList([emb, Holder()])]
    said = []
    for model in models:
        with pytest.raises(se.errors.ConfigError) as error:
            se.prefetched([], model)
        said.append(str(error.value))
    for depth in (0, True, 1.5):
        with pytest.raises(se.errors.ConfigError, match="depth must be a whole number of batches from 1 on"):
            se.prefetched([], emb, depth)  # type: ignore[arg-type]
    return said


def test_models_of_which_it_cannot_be_told_what_to_send_are_refused_at_once() -> None:
    nothing, modules, holder, two = run_ranks(1, refusals)[0]
    assert "the model has no sharded tables: use se.synced(loader)" in nothing
    assert "convert it with se.shard(model, inputs=lambda batch: {path: ids, ...})" in modules
    assert "pass arguments=lambda batch: (what the collection is called with,)" in holder
    assert "the model makes 2 calls for its tables a step" in two


def weighted(rank: int, world_size: int) -> str:
    torch.manual_seed(0)
    emb = se.EmbeddingCollection([se.TableConfig("a", 9, 4)], plan=se.row_wise())
    weight = torch.ones(3, requires_grad=True)
    offsets = torch.tensor([0, 3])
    for ticket in se.prefetched([{"a": (torch.arange(3), offsets, weight)}], emb):
        emb(ticket)["a"].sum().backward()
    assert weight.grad is not None, "weights that are leaves have their gradients"
    with pytest.raises(se.errors.ConfigError) as error:
        next(se.prefetched([{"a": (torch.arange(3), offsets, 2 * weight if rank else weight.detach())}], emb))
    return str(error.value)


def test_weights_that_follow_from_parameters_are_not_taken_from_before_a_step() -> None:
    for said in run_ranks(2, weighted):
        assert said.startswith("rank 1: per-sample weights that are computed from parameters cannot be sent ahead")


# What the loader and the loop may do.


def bounded(rank: int, world_size: int, depth: int) -> tuple[list[int], bool]:
    """How many batches have been read when the loop gets each, and whether the main thread read them."""
    read: list[threading.Thread] = []
    emb = se.EmbeddingCollection(TABLES, plan=se.row_wise())

    def loader() -> Iterator[Any]:
        for step in range(4):
            read.append(threading.current_thread())
            yield batch_of(rank, step, TABLES)

    seen = []
    for ticket in se.prefetched(loader(), emb, depth):
        seen.append(len(read))
        if len(seen) != 2:  # left out on all ranks alike
            emb(ticket)
    return seen, set(read) == {threading.main_thread()}


@pytest.mark.parametrize("depth", [1, 2])
def test_only_depth_batches_are_read_ahead_and_in_the_main_thread(depth: int) -> None:
    assert run_ranks(2, bounded, depth) == [([min(4, number + depth + 1) for number in range(4)], True)] * 2


class LeftError(Exception):
    """Raised in a loop's body."""


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "shardembed-prefetch"}


def leave(emb: se.EmbeddingCollection, loader: Iterable[Any], how: str) -> None:
    """Leave a loop at its second batch."""
    for number, ticket in enumerate(se.prefetched(loader, emb, depth=2)):
        emb(ticket)
        if number < 1:
            continue
        if how == "break":
            break
        raise LeftError if how == "error" else KeyboardInterrupt


def left(rank: int, world_size: int) -> list[int]:
    """The threads that are alive after loops were left in all ways; each loop finds the groups ready."""
    emb = se.EmbeddingCollection(TABLES, plan=se.row_wise())
    loader = [batch_of(rank, step, TABLES) for step in range(4)]
    alive = []
    before = workers()  # of loops that tests before this one left by an error, and that a traceback may still hold
    for how in ("break", "error", "interrupt", "break"):
        with suppress(LeftError, KeyboardInterrupt):
            leave(emb, loader, how)
        alive.append(len(workers() - before))
    unread = se.prefetched(loader, emb)
    assert not workers() - before, "a loop that was not begun has a thread"
    assert next(unread) is not None
    alive.append(len(workers() - before))
    del unread
    alive.append(len(workers() - before))
    bad = [loader[0], loader[1], {"a": torch.tensor([99])}]  # nobody ever looks at the third
    for ticket in se.prefetched(bad, emb, depth=2):
        emb(ticket)
        break
    assert len(list(se.prefetched(loader, emb))) == 4
    assert len(list(se.synced(loader))) == 4
    return [*alive, len(workers() - before)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loop_may_be_left_and_the_next_one_begins_with_quiet_groups(world_size: int) -> None:
    assert run_ranks(world_size, left) == [[0, 0, 0, 0, 1, 0, 0]] * world_size
