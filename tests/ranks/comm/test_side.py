"""The side Comm: a second one over the same ranks, for a thread that talks while training goes on."""

from __future__ import annotations

import threading
from unittest import mock

import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm import diagnosis
from shardembed.comm.comm import Comm
from shardembed.errors import CollectiveError
from tests.harness import run_ranks
from tests.ranks.strays import own_job, warm_up


def gather(comm: Comm, to: int | None) -> list[str]:
    return comm.gather_texts("control", "texts", "é" * 10 * comm.rank, to=to)


def gathered(rank: int, world_size: int) -> tuple[list[str], list[str], int]:
    """What this rank gets of everybody's texts, of those for rank 1, and how many bytes it sent for the latter."""
    comm = se.init()
    everybody = gather(comm, None)
    comm.tally.clear()
    return everybody, gather(comm, 1), comm.tally.bytes["all_to_all", "texts"]


def test_texts_for_one_rank_go_to_no_other() -> None:
    texts = ["é" * 10 * rank for rank in range(3)]
    sizes = 8 * 2  # an int64 to each other rank
    answers = run_ranks(3, gathered)
    assert [everybody for everybody, _, _ in answers] == [texts] * 3
    assert [for_one for _, for_one, _ in answers] == [[], texts, []]
    assert [sent for _, _, sent in answers] == [sizes, sizes, sizes + 40]


def test_one_rank_has_its_own_text() -> None:
    assert gather(Comm.of().side(), 0) == [""]


def talk(comm: Comm, rank: int, seen: list[float]) -> None:
    for number in range(20):
        comm.history.stand_at(number)
        seen.append(float(comm.all_reduce("talk", torch.tensor([float(rank + number)]))))


def talk_beside_training(rank: int, world_size: int) -> tuple[list[float], bool, int]:
    """Ranks train a different number of steps while their threads talk; then they train together."""
    job = own_job(rank, world_size)
    side = job.comm.side()
    before = job.comm.history.checksum, dict(job.comm.tally.calls)
    seen: list[float] = []
    thread = threading.Thread(target=talk, args=(side, rank, seen))
    if rank == 0:
        thread.start()
        job.train()
    else:
        job.train()
        thread.start()
    job.train()
    thread.join()
    job.train()
    assert side is job.comm.side(), "a second one was made"
    untouched = before[0] != job.comm.history.checksum and ("all_reduce", "talk") not in job.comm.tally.calls
    return seen, untouched, job.comm.history.step


def test_a_thread_talks_while_training_goes_on() -> None:
    wanted = [1.0 + 2 * number for number in range(20)]
    assert run_ranks(2, talk_beside_training) == [(wanted, True, 3)] * 2


def fail_beside_training(rank: int, world_size: int) -> tuple[str, int]:
    """Rank 1 misses a call on the side; training does not notice."""
    warm_up(rank)
    job = own_job(rank, world_size)
    side = job.comm.side()
    side.history.stand_at(7)
    said = ""
    if rank == 0:
        with mock.patch.object(diagnosis, "REPORT_SECONDS", 0.2):
            try:
                side.all_reduce("save: all have written", torch.zeros(1))
            except CollectiveError as error:
                said = str(error)
    dist.barrier()  # rank 1 would wait in its training, too long for the short time limit
    job.train()
    return said, job.comm.history.step


def test_an_error_on_the_side_names_the_stage_and_leaves_training_alone() -> None:
    (said, steps), other = run_ranks(2, fail_beside_training, fresh_ranks=True)
    assert "in stage 'save: all have written' (all_reduce), optimizer step 7, and the call did not complete" in said
    assert "Missing: rank(s) [1]" in said
    assert (steps, other) == (1, ("", 1))
