"""`prefetched` where something is wrong on some rank: all ranks hear of it in place of the batch, and nobody hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm import diagnosis
from shardembed.comm.beside import Line
from shardembed.comm.streams import Side, tensors_in
from shardembed.errors import CollectiveError, DisagreementError
from tests.harness import run_ranks
from tests.ranks.strays import own_job, warm_up

Told = tuple[int, str, str]
TABLES = [se.TableConfig("a", 30, 4)]


def good(count: int) -> list[dict[str, torch.Tensor]]:
    return [{"a": torch.arange(3) + number} for number in range(count)]


def failing(count: int) -> Iterator[dict[str, torch.Tensor]]:
    yield from good(count)
    raise OSError(f"cannot read batch {count}")


def malformed(at: int) -> list[dict[str, torch.Tensor]]:
    return [*good(at), {"a": torch.tensor([99])}, *good(2)]


def listen(emb: se.EmbeddingCollection, loader: Iterable[Any], depth: int = 1, **options: Any) -> Told:
    """The batches that a loop got, and the error that ended it."""
    seen = 0
    try:
        for ticket in se.prefetched(loader, emb, depth, **options):
            emb(ticket)
            seen += 1
    except Exception as error:
        return seen, type(error).__name__, str(error)
    return seen, "", ""


def together(rank: int, world_size: int, loaders: list[Any], depth: int) -> Told:
    """What the loader of each rank leads to; ranks that had not ended together would not go on alike."""
    emb = se.EmbeddingCollection(TABLES, plan=se.row_wise())
    make, *arguments = loaders[rank]
    told = listen(emb, make(*arguments), depth)
    assert listen(emb, good(2), 3) == (2, "", "")
    assert emb.rows("a", torch.arange(2)).shape == (2, 4)
    assert all(thread.name != "shardembed-prefetch" for thread in threading.enumerate()), "a thread is left"
    return told


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("numbers", [[3, 3], [2, 5], [5, 0], [4, 1, 2]])
def test_all_ranks_stop_with_the_first_that_runs_out(numbers: list[int], depth: int) -> None:
    loaders = [(good, number) for number in numbers]
    assert run_ranks(len(numbers), together, loaders, depth) == [(min(numbers), "", "")] * len(numbers)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_malformed_batch_is_told_in_its_place(culprit: int, depth: int) -> None:
    loaders = [(malformed, 2) if rank == culprit else (good, 5) for rank in range(2)]
    for seen, name, text in run_ranks(2, together, loaders, depth):
        assert (seen, name) == (2, "IdRangeError")
        assert text.startswith(f"rank {culprit}: table 'a', feature 'a': id 99 at position 0")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("after", [0, 3])
def test_a_loader_that_fails_ends_all_ranks_and_its_own_raises_its_error(after: int, depth: int) -> None:
    other, own = run_ranks(2, together, [(good, 5), (failing, after)], depth)
    assert own == (after, "OSError", f"cannot read batch {after}")
    assert other[:2] == (after, "LoaderError")
    assert other[2] == f"rank 1: the data loader failed with OSError: cannot read batch {after}. All ranks stop here"


def test_of_several_things_at_once_a_failure_comes_before_the_end_and_the_end_before_a_batch_that_nobody_reads() -> None:
    first, second, third = run_ranks(3, together, [(malformed, 1), (good, 1), (failing, 1)], 1)
    assert (first[:2], second[:2]) == ((1, "LoaderError"), (1, "LoaderError"))
    assert third[:2] == (1, "OSError")
    assert run_ranks(2, together, [(malformed, 1), (good, 1)], 1) == [(1, "", "")] * 2


def arguments_fail(rank: int, world_size: int) -> list[Told]:
    """A function of the user's that fails on one rank: the one that says what the model is called with, and `inputs=`."""
    emb = se.EmbeddingCollection(TABLES, plan=se.row_wise())

    def one(batch: Any) -> tuple[Any]:
        return (batch if rank else batch["b"],)

    def inputs(batch: Any) -> dict[str, Any]:
        return {"0": batch["a" if rank else "b"]}

    model = se.shard(torch.nn.Sequential(torch.nn.Embedding(30, 4)), inputs=inputs, plan=se.row_wise(), verbose=False)
    told = [listen(emb, good(2), arguments=one)]
    with pytest.raises((KeyError, se.errors.InputError)):
        next(se.prefetched(good(2), model))
    with pytest.raises((KeyError, se.errors.InputError)):
        model(good(1)[0])
    return [*told, listen(emb, good(2))]


def test_functions_of_the_users_that_fail_on_one_rank_are_heard_of_on_all() -> None:
    own, other = run_ranks(2, arguments_fail)
    assert own == [(0, "KeyError", "'b'"), (2, "", "")]
    assert other == [(0, "InputError", "rank 0: KeyError: 'b'"), (2, "", "")]


# Ranks that go different ways.


def break_at(emb: se.EmbeddingCollection, last: int) -> None:
    for number, ticket in enumerate(se.prefetched(good(9), emb)):
        if number == last:
            break
        emb(ticket)


def skip(emb: se.EmbeddingCollection, left_out: int | None) -> None:
    for number, ticket in enumerate(se.prefetched(good(9), emb)):
        if number != left_out:
            emb(ticket)


def evaluate(emb: se.EmbeddingCollection, alone: bool) -> None:
    with torch.set_grad_enabled(not alone):
        for ticket in se.prefetched(good(9), emb):
            emb(ticket)


def step_alone(emb: se.EmbeddingCollection, alone: bool) -> None:
    optimizer = se.Optimizer(emb)
    for ticket in se.prefetched(good(9), emb):
        emb(ticket)["a"].sum().backward()
        if not alone:
            optimizer.step()


def another_loop(emb: se.EmbeddingCollection, alone: bool) -> None:
    """Rank 0 leaves its loop early and begins another; the others are still in the first."""
    loop = se.prefetched(good(9), emb)
    next(loop)
    if alone:
        loop.close()  # type: ignore[attr-defined]
        loop = se.prefetched(good(9), emb)
    for _ in range(2):
        next(loop)


STRAYS: dict[str, Callable[[se.EmbeddingCollection, bool], None]] = {
    "break": lambda emb, alone: break_at(emb, 2 if alone else 3),
    "skip": lambda emb, alone: skip(emb, 2 if alone else None),
    "evaluate": evaluate,
    "step": step_alone,
    "loop": another_loop,
}


def stray(rank: int, world_size: int) -> dict[str, tuple[str, str]]:
    """What each rank hears when rank 0 goes another way; at the end of each way, all of them make the same call."""
    warm_up(rank)
    heard: dict[str, tuple[str, str]] = {}
    for way, go in STRAYS.items():
        dist.barrier()
        group = own_job(rank, world_size).group
        emb = se.EmbeddingCollection(TABLES, plan=se.row_wise(), optimizer=se.optim.SGD(), process_group=group)
        with mock.patch.object(diagnosis, "REPORT_SECONDS", 0.2):
            try:
                go(emb, rank == 0)
                emb(good(1)[0])
            except (CollectiveError, DisagreementError) as error:
                heard[way] = type(error).__name__, str(error)
    return heard


EXPECTED = {
    "break": (
        "CollectiveError",
        ["'forward: counts' (all_to_all), forward call 4", "'forward: send back' (all_to_all, of forward call 3)"],
    ),
    "skip": ("CollectiveError", ["of forward call 4)", "of forward call 3)"]),
    "evaluate": ("DisagreementError", ["rank 0 makes a forward in evaluation mode", "rank 1 makes a forward in training mode"]),
    "step": ("DisagreementError", ["Every rank must take every step"]),
    "loop": ("DisagreementError", ["They did not make the same calls before"]),
}


def test_ranks_that_go_different_ways_are_told_apart_and_do_not_hang() -> None:
    for heard in run_ranks(2, stray, fresh_ranks=True):
        assert {way: name for way, (name, _) in heard.items()} == {way: name for way, (name, _) in EXPECTED.items()}
        for way, (_, parts) in EXPECTED.items():
            assert all(part in heard[way][1] for part in parts), heard[way]


# The parts that a GPU uses.


@dataclass(frozen=True)
class Pair:
    one: torch.Tensor
    more: dict[str, Any]


def test_every_tensor_of_a_batch_is_found_once() -> None:
    tensors = [torch.zeros(number) for number in range(4)]
    nested = torch.nested.nested_tensor_from_jagged(torch.arange(3), torch.tensor([0, 1, 3]))
    value = [Pair(tensors[0], {"x": (tensors[1], "text", None)}), mock.Mock(spec=[], hidden=tensors[2]), tensors[0], nested]
    found = list(tensors_in(value))
    assert {id(tensor) for tensor in tensors[:3]} <= {id(tensor) for tensor in found}
    assert len(found) == 5


def test_what_comes_behind_a_failure_is_dropped() -> None:
    line, done = Line(Side()), []

    def fail() -> None:
        raise LookupError("no")

    for work in (lambda: done.append(0), fail, lambda: done.append(1)):
        line.submit(work, None)
    assert line.take(lambda value: None).error is None
    assert isinstance(line.take(lambda value: None).error, LookupError)
    line.close()
    assert done == [0]
