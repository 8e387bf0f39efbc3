"""Stages of a save or load that take long on one rank, and those that fail on some."""

from __future__ import annotations

import time
from typing import Any

import torch.distributed as dist

import shardembed as se
from shardembed.checkpoint.together import on_first, together
from shardembed.errors import CheckpointError
from tests.harness import run_ranks

TIMEOUT = 1.5


def take_long(rank: int, world_size: int) -> Any:
    group = dist.new_group(list(range(world_size)))
    comm = se.Comm.of(group, timeout=TIMEOUT).side()

    def work() -> str:
        time.sleep(2 * TIMEOUT if rank == 1 else 0.0)  # a slow disk
        return f"rank {rank} is done"

    texts = together(comm, "write", work, long=True)
    calls = comm.tally.operations()["all_to_all"] // 2
    return texts, calls, on_first(comm, "publish", lambda: f"by rank {rank}", long=True)


def test_a_rank_that_is_slower_than_the_time_out_is_waited_for() -> None:
    for texts, calls, published in run_ranks(2, take_long, fresh_ranks=True):
        assert texts == ["rank 0 is done", "rank 1 is done"]
        assert calls > 2  # it gave signs of life
        assert published == "by rank 0"


def fail(rank: int, world_size: int) -> list[str]:
    comm = se.Comm.of().side()
    found = []

    def work() -> str:
        if rank != 1:
            raise OSError(28, "No space left on device", "/there/file") if rank == 0 else ValueError("of its own")
        return ""

    for long in (False, True):
        try:
            together(comm, "write", work, long)
        except CheckpointError as error:
            found.append(str(error))
    return found


def test_what_any_rank_meets_is_raised_by_all() -> None:
    message = "rank 0: /there/file: No space left on device; rank 2: ValueError: of its own"
    assert run_ranks(3, fail) == [[message, message]] * 3
