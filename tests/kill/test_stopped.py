"""A rank that is stopped (SIGSTOP) neither closes its connections nor answers: the others end within the time limit and name it.

Rank 0 hosts the store here. When it is stopped the store does not answer either, and torch's client would wait for it for ever.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm import job as jobs
from shardembed.errors import CollectiveError
from tests.kill.nursery import Ended, run_forked, values
from tests.kill.trainer import Run, train
from tests.kill.trap import Point

TIMEOUT = 2.0  # a loaded machine is slow to start, and to bring files to its disk
SILENT = "The store where ranks meet does not answer: rank 0, which hosts it unless a launcher does, is stopped or hangs."


def errors(ended: list[Ended], odd: int) -> list[str]:
    """What the other ranks raised, all of them by themselves."""
    others = [end for rank, end in enumerate(ended) if rank != odd]
    for end in others:
        assert not end.by_test, "it was still waiting"
        assert isinstance(end.error, CollectiveError), end
    return [str(end.error) for end in others]


EVENTS = {
    "forward": "collective forward: send ids",
    "backward": "slab accumulate",
    "save": "fsync rank-0000.*",
    "load": "collective checkpoint: compare with the model",
}


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("forward", 2),
        ("save", 0),
        *(pytest.param(*more, marks=pytest.mark.matrix) for more in [("backward", 0), ("save", 2), ("load", 0)]),
    ],
)
def test_the_others_end_and_name_the_rank_that_is_stopped(name: str, odd: int, tmp_path: Path) -> None:
    run = Run(tmp_path, exact=True, timeout=TIMEOUT)
    if name == "load":
        run_forked(3, train, Run(tmp_path, exact=True, batches=2), None)
    point = Point(EVENTS[name], rank=odd, batch=-1 if name == "load" else 4, signal=signal.SIGSTOP)
    for text in errors(run_forked(3, train, run, point, stopped=(odd,), group_timeout=TIMEOUT), odd):
        assert " in stage " in text, text
        assert "optimizer step " in text, text
        assert (SILENT if odd == 0 else "Missing: rank(s) [2] did not take part") in text, text


def save_in_background(rank: int, world_size: int, folder: Path) -> str:
    """Rank 0 is stopped while a thread saves; training on rank 1 is told by the next save."""
    run = Run(folder, "async", timeout=TIMEOUT)
    train(rank, world_size, run, Point("collective checkpoint: write", batch=1, signal=signal.SIGSTOP))
    return "trained on"


@pytest.mark.matrix
def test_a_background_save_names_it_too(tmp_path: Path) -> None:
    for attempt in range(5):
        ended = run_forked(2, save_in_background, tmp_path / str(attempt), stopped=(0,), group_timeout=TIMEOUT)
        if isinstance(ended[1].error, CollectiveError):
            break  # else rank 1 stood in an all-reduce of DistributedDataParallel, which is torch's to tell of
    (text,) = errors(ended, 0)
    assert SILENT in text


def leave_after_error(rank: int, world_size: int, stage: str) -> str:
    """What an ordinary process does at its end must not wait for the stopped one either."""
    comm = se.init(timeout=TIMEOUT)
    comm.all_reduce("both have got here", torch.ones(1))  # else the other might still be joining
    jobs._joined.append(True)
    said = "nothing"
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        if stage == "new groups":
            comm.side()
        else:
            with comm.guarding(stage):
                dist.all_reduce(torch.ones(1))
    except CollectiveError as error:
        said = str(error)
    jobs._leave()
    return said


@pytest.mark.matrix
@pytest.mark.parametrize("stage", ["new groups", "dense gradients"])
def test_the_process_ends_though_the_store_does_not_answer(stage: str) -> None:
    _, other = run_forked(2, leave_after_error, stage, stopped=(0,), group_timeout=TIMEOUT)
    assert (other.code, other.by_test) == (0, False), other
    assert SILENT in other.value
    assert ("to make process groups" if stage == "new groups" else f"in stage '{stage}'") in other.value


def fail_otherwise(rank: int, world_size: int) -> str:
    comm = se.init()
    with pytest.raises(RuntimeError, match="mine"), comm.guarding("dense gradients"):
        raise RuntimeError("mine")
    comm.all_reduce("both have got here", torch.ones(1))
    return "passed through"


def test_other_errors_pass_through() -> None:
    assert values(run_forked(2, fail_otherwise)) == ["passed through"] * 2
