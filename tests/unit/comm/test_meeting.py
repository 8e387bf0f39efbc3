"""Ranks of one start agree on a name through a store that still holds what earlier starts wrote."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm import comm
from shardembed.comm.rendezvous import KEY, agreed_name
from shardembed.errors import CollectiveError

SECONDS = 60.0


def begin(store: dist.Store, ranks: int, order: list[int]) -> str:
    """The name that the threads of a start agree on; they begin in the given order."""
    with ThreadPoolExecutor(ranks) as pool:
        waiting = [pool.submit(agreed_name, store, rank, ranks, SECONDS) for rank in order]
        names = {one.result() for one in waiting}
    assert len(names) == 1
    return names.pop()


def test_every_start_has_a_name_of_its_own_whoever_comes_first() -> None:
    store = dist.HashStore()
    starts = [(3, [0, 1, 2]), (3, [2, 1, 0]), (2, [1, 0]), (4, [3, 2, 1, 0]), (1, [0]), (3, [1, 2, 0])]
    names = [begin(store, ranks, order) for ranks, order in starts]
    assert len(set(names)) == len(starts)


def test_a_rank_does_not_believe_what_another_start_has_confirmed() -> None:
    store = dist.HashStore()
    name = begin(store, 2, [0, 1])
    with pytest.raises(CollectiveError, match="rank 1 did not hear from rank 0"):
        agreed_name(store, 1, 2, timeout=0.1)
    assert store.get(KEY).decode() == name  # what it was offered was an old one


def test_rank_0_says_when_others_do_not_come() -> None:
    with pytest.raises(CollectiveError, match="rank 0 did not hear from all other ranks"):
        agreed_name(dist.HashStore(), 0, 2, timeout=0.1)


def test_tables_of_a_rank_that_has_not_joined_its_job_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "_known", {})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CollectiveError, match=r"rank 1 of 2 of a job.*call se.init\(\) first"):
        se.Embedding(10, 4)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert se.Embedding(10, 4)(torch.tensor([3])).shape == (1, 4)
