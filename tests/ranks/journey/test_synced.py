"""`synced`: ranks agree on the end of data, whatever their loaders do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import shardembed as se
from tests.harness import run_ranks

Told = tuple[list[Any], str, str]


def listen(batches: Iterable[Any]) -> Told:
    """The batches seen, and the error that ended them."""
    seen: list[Any] = []
    try:
        for batch in se.synced(batches):
            seen.append(batch)
    except Exception as error:
        return seen, type(error).__name__, str(error)
    return seen, "none", ""


def still_together(rank: int, told: Told) -> Told:
    """Ranks that had not ended together would not agree here."""
    assert list(se.synced(range(2))) == [0, 1]
    emb = se.Embedding(10, 3, plan=se.row_wise())
    assert emb(torch.arange(rank)).shape == (rank, 3)
    return told


def counted(rank: int, world_size: int, numbers: list[int]) -> Told:
    return still_together(rank, listen(range(numbers[rank])))


@pytest.mark.parametrize("numbers", [[3, 3], [2, 5], [5, 2], [0, 4], [4, 0], [0, 0], [4, 0, 2], [1, 3, 2]])
def test_all_ranks_stop_with_the_first_that_runs_out(numbers: list[int]) -> None:
    expected = list(range(min(numbers))), "none", ""
    assert run_ranks(len(numbers), counted, numbers) == [expected] * len(numbers)


def test_alone_it_is_the_loader_itself() -> None:
    assert run_ranks(1, counted, [3]) == [([0, 1, 2], "none", "")]


def failing(number: int) -> Iterator[int]:
    yield from range(number)
    raise OSError(f"cannot read batch {number}")


def fail(rank: int, world_size: int, culprits: dict[int, int]) -> Told:
    """The culprits' loaders fail after so many batches."""
    return still_together(rank, listen(failing(culprits[rank]) if rank in culprits else range(5)))


@pytest.mark.parametrize(("world_size", "culprit", "after"), [(2, 0, 2), (2, 1, 0), (3, 1, 3)])
def test_a_loader_that_fails_ends_all_ranks(world_size: int, culprit: int, after: int) -> None:
    for rank, told in enumerate(run_ranks(world_size, fail, {culprit: after})):
        if rank == culprit:
            assert told == (list(range(after)), "OSError", f"cannot read batch {after}")
            continue
        seen, error, text = told
        assert (seen, error) == (list(range(after)), "DataError")
        assert text == f"the data loader of rank {culprit} failed; its own error says why. All ranks stop here"


def test_the_earliest_failure_counts_and_each_that_failed_raises_its_own() -> None:
    early, other, late = run_ranks(3, fail, {0: 1, 2: 3})
    assert early == ([0], "OSError", "cannot read batch 1")
    assert other[1] == late[1] == "DataError"
    assert "rank 0" in other[2]
    first, other, last = run_ranks(3, fail, {0: 1, 2: 1})
    assert first == last == ([0], "OSError", "cannot read batch 1")
    assert other[:2] == ([0], "DataError")


def fail_at_the_end(rank: int, world_size: int) -> Told:
    return still_together(rank, listen(failing(2) if rank == 0 else range(2)))


def test_a_failure_counts_also_where_another_rank_runs_out() -> None:
    first, other = run_ranks(2, fail_at_the_end)
    assert first == ([0, 1], "OSError", "cannot read batch 2")
    assert other[1] == "DataError"


class NoIterator:
    """A loader that cannot even be started."""

    def __iter__(self) -> Iterator[int]:
        raise FileNotFoundError("no such file")


def fail_at_once(rank: int, world_size: int) -> Told:
    return still_together(rank, listen(NoIterator() if rank == 1 else range(2)))


def test_a_loader_that_cannot_be_started_ends_all_ranks() -> None:
    other, first = run_ranks(2, fail_at_once)
    assert first == ([], "FileNotFoundError", "no such file")
    assert other[1] == "DataError"


def kinds(rank: int, world_size: int) -> list[list[Any]]:
    """Loaders of every kind, each longer on rank 1."""
    size = 3 + rank
    read: list[int] = []

    def generator() -> Iterator[int]:
        for number in range(size):
            read.append(number)
            yield number

    loader = DataLoader(torch.arange(2 * size), batch_size=2)  # type: ignore[arg-type]
    found = [list(se.synced(generator())), list(se.synced(iter(range(size)))), [b.tolist() for b in se.synced(loader)]]
    again = [b.tolist() for b in se.synced(loader)]  # another epoch
    return [*found, again, read]


def test_generators_iterators_and_data_loaders_are_served() -> None:
    batches = [[0, 1], [2, 3], [4, 5]]
    for rank, found in enumerate(run_ranks(2, kinds)):
        # The rank that has more draws one batch that nobody sees.
        assert found == [[0, 1, 2], [0, 1, 2], batches, batches, list(range(3 + rank))]


def train_unequal(rank: int, world_size: int) -> int:
    emb = se.Embedding(10, 3, plan=se.row_wise(), optimizer=se.optim.SGD(lr=0.1))
    optimizer = se.Optimizer(emb)
    for number in se.synced(range(3 - rank)):
        emb(torch.tensor([number])).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return emb.journey.steps


def test_ranks_with_unequal_numbers_of_batches_take_as_many_steps() -> None:
    assert run_ranks(3, train_unequal) == [1, 1, 1]
