"""Collective calls that some ranks miss: never a hang, never one call's values in another, and the same clear error for all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

import shardembed as se
from shardembed.comm import diagnosis
from tests.amount import exhaustive
from tests.harness import RankDiedError, run_ranks
from tests.ranks.strays import DISAGREE, SAME_CALLS, SCENARIOS, TIMED_OUT, Heard, Job, hear, own_job, play, some


@pytest.fixture(scope="module")
def heard(request: pytest.FixtureRequest) -> list[Heard]:
    names = list(SCENARIOS) if request.config.getoption("--all") else some()
    return run_ranks(2, play, names, fresh_ranks=True)


@pytest.mark.parametrize("name", [name if name in some() else exhaustive(name) for name in SCENARIOS])
def test_what_one_rank_does_alone_ends_in_an_error_on_both(name: str, heard: list[Heard]) -> None:
    scenario = SCENARIOS[name]
    for rank, (error, text) in enumerate(found[name] for found in heard):
        assert error == scenario.error.__name__, f"rank {rank}: {error}: {text}"
        assert all(part in text for part in scenario.says), f"rank {rank}: {text}"
        if scenario.error is TIMED_OUT:
            assert text.startswith(f"rank {rank} waited "), text
            assert f"Rank {1 - rank} stood in stage " in text, text
            assert SAME_CALLS in text, text
    if scenario.error is DISAGREE:
        assert heard[0][name] == heard[1][name], "every rank must hear the same"


AMONG_THREE = ["rows", "one forward more", "no step, cut tables", "no clipping", "a loss of one module, the others' of another"]


def leave_early(job: Job) -> None:
    """The loop over four batches; rank 0 leaves it after the second, and makes no call any more."""
    for number, _ in enumerate(se.synced(range(4), job.comm)):
        job.train()
        if job.rank == 0 and number == 1:
            break


def die(job: Job) -> None:
    """Train; rank 1 ends between a forward and its backward."""
    job.train()
    loss = job.forward()
    if job.rank == 1:
        os._exit(17)
    loss.backward()


def play_among_three(rank: int, world_size: int, file: Path) -> Heard:
    """Rank 1, which dies in the end, leaves what it heard in a file."""
    diagnosis.REPORT_SECONDS = 1.0
    found = play(rank, world_size, AMONG_THREE)
    found["leaves the loop early"] = hear(own_job(rank, world_size), leave_early)
    job = own_job(rank, world_size)
    with mock.patch.object(dist.distributed_c10d, "_get_default_store", side_effect=RuntimeError("connection reset")):
        found["the store is gone"] = hear(job, SCENARIOS["one forward more"].odd if rank == 0 else Job.train)
    job = own_job(rank, world_size)
    if rank == 1:
        file.write_text(json.dumps(found))
    return {**found, "dies": hear(job, die)}


@pytest.fixture(scope="module")
def heard_by_three(tmp_path_factory: pytest.TempPathFactory) -> list[Heard]:
    file = tmp_path_factory.mktemp("safety") / "heard by rank 1"
    first, dead, last = run_ranks(3, play_among_three, file, expect_errors=True, fresh_ranks=True)
    assert first.error is None, first.traceback
    assert last.error is None, last.traceback
    assert isinstance(dead.error, RankDiedError), dead
    assert "exit code 17" in str(dead.error)
    by_the_dead = {name: tuple(said) for name, said in json.loads(file.read_text()).items()}
    return [first.value, by_the_dead, last.value]


@pytest.mark.parametrize("name", AMONG_THREE)
def test_what_one_rank_of_three_does_alone_ends_in_an_error_on_all(name: str, heard_by_three: list[Heard]) -> None:
    scenario = SCENARIOS[name]
    for rank, (error, text) in enumerate(found[name] for found in heard_by_three):
        assert error == scenario.error.__name__, f"rank {rank}: {error}: {text}"
        assert all(part in text for part in scenario.says), f"rank {rank}: {text}"


def test_a_rank_that_leaves_the_loop_is_named_by_the_others(heard_by_three: list[Heard]) -> None:
    left, *others = [found["leaves the loop early"] for found in heard_by_three]
    assert left == ("none", "no error")
    for rank, (error, text) in enumerate(others, 1):
        assert error == TIMED_OUT.__name__, f"{error}: {text}"
        assert text.startswith(f"rank {rank} waited "), text
        assert "in stage 'synced: agree on the end of data' (all_reduce), forward call 2, optimizer step 2" in text, text
        assert "Missing: rank(s) [0] did not take part: they crashed, hang, or have left the loop" in text, text
        assert f"Rank {3 - rank} stood there too." in text, text


def test_without_a_store_the_error_says_so(heard_by_three: list[Heard]) -> None:
    for rank, (error, text) in enumerate(found["the store is gone"] for found in heard_by_three):
        assert error == TIMED_OUT.__name__, f"{error}: {text}"
        assert text.startswith(f"rank {rank} waited "), text
        assert "The store where ranks meet is gone: the launcher, which hosts it, has ended." in text, text


def test_a_rank_that_dies_is_named_by_the_others(heard_by_three: list[Heard]) -> None:
    for error, text in (heard_by_three[rank]["dies"] for rank in (0, 2)):
        assert error == TIMED_OUT.__name__, f"{error}: {text}"
        assert "'backward: send gradients' (all_to_all, of forward call 2), forward call 2, optimizer step 1" in text, text
        assert "Missing: rank(s) [1] did not take part" in text, text
