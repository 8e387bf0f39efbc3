"""The rank processes of the tests: they are reused, their errors arrive, none is waited for without end."""

from __future__ import annotations

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.harness import RankDiedError, RankError, RankTimeoutError, run_ranks


def sum_over_ranks(rank: int, world_size: int, values: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = values * (rank + 1)
    dist.all_reduce(total)
    return os.getpid(), total


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def group_is_up(rank: int, world_size: int) -> tuple[int, bool]:
    return os.getpid(), dist.is_initialized()


def draw(rank: int, world_size: int) -> list[float]:
    return torch.rand(3).tolist()


def fail_on_rank_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the second rank is unhappy")
    dist.barrier()  # never completes


def refuse(rank: int, world_size: int) -> None:
    raise KeyError(f"rank {rank} refuses")


class NeedsTwoError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_needs_two(rank: int, world_size: int) -> None:
    raise NeedsTwoError(1, 2)


def sleep_on_rank_zero(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def die_on_rank_one(rank: int, world_size: int) -> str:
    if rank == 1:
        os._exit(3)
    return "alive"


def test_two_ranks_reduce_and_are_reused() -> None:
    first = run_ranks(2, sum_over_ranks, torch.arange(3.0))
    second = run_ranks(2, sum_over_ranks, torch.ones(2))
    torch.testing.assert_close([total for _, total in first], [torch.tensor([0.0, 3.0, 6.0])] * 2)
    torch.testing.assert_close([total for _, total in second], [torch.full((2,), 3.0)] * 2)
    assert [pid for pid, _ in first] == [pid for pid, _ in second]
    assert len({os.getpid(), *(pid for pid, _ in first)}) == 3


def loaded(rank: int, world_size: int) -> tuple[bool, int]:
    return "tests.warm" in sys.modules, hash("a text")


@pytest.mark.skipif(sys.platform != "linux" or "PYTHONHASHSEED" in os.environ, reason="ranks are no forks, or all hashes are alike")
def test_ranks_are_forks_with_everything_loaded_and_of_two_one_hashes_otherwise() -> None:
    (first, hashed), (second, otherwise) = run_ranks(2, loaded)
    assert (first, second) == (True, True)
    assert hashed != otherwise
    assert run_ranks(2, loaded, fresh_ranks=True) == [(True, hashed)] * 2


def test_every_call_starts_from_the_same_seed() -> None:
    here, again = run_ranks(1, draw), run_ranks(2, draw)
    assert here * 2 == again == run_ranks(2, draw)


def test_one_rank_is_this_process_without_a_group() -> None:
    assert run_ranks(1, group_is_up) == [(os.getpid(), False)]
    with pytest.raises(RankError, match="rank 0 of 1: KeyError"):
        run_ranks(1, refuse)


def test_an_error_names_its_rank_while_the_peer_waits() -> None:
    before = run_ranks(2, process_id)
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1 of 2: ValueError: the second rank is unhappy") as caught:
        run_ranks(2, fail_on_rank_one, timeout=3600)
    assert time.monotonic() - start < 1800, "the peer in the barrier should be ended after the grace, not at the time limit"
    assert caught.value.rank == 1
    assert isinstance(caught.value.__cause__, ValueError)
    assert "fail_on_rank_one" in caught.value.traceback
    assert not set(before) & set(run_ranks(2, process_id)), "a group that is out of step must not be used again"


def test_an_error_all_ranks_agree_on_keeps_the_pool() -> None:
    before = run_ranks(2, process_id)
    outcomes = run_ranks(2, refuse, expect_errors=True)
    assert [str(outcome.error) for outcome in outcomes] == ["'rank 0 refuses'", "'rank 1 refuses'"]
    assert run_ranks(2, process_id) == before


def test_an_error_that_does_not_pickle_arrives_as_text() -> None:
    with pytest.raises(RankError, match="NeedsTwoError: 1 and 2"):
        run_ranks(2, raise_needs_two)


def test_a_rank_that_hangs_is_ended_and_shows_where_it_stood() -> None:
    before = run_ranks(2, process_id)
    with pytest.raises(RankTimeoutError, match=r"no answer from rank\(s\) \[0\] of 2 within 2 s") as caught:
        run_ranks(2, sleep_on_rank_zero, timeout=2)
    assert "sleep_on_rank_zero" in str(caught.value)
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_fresh_ranks_are_thrown_away_and_a_death_is_an_outcome() -> None:
    kept = run_ranks(2, process_id)
    outcomes = run_ranks(2, die_on_rank_one, expect_errors=True, fresh_ranks=True)
    assert outcomes[0].value == "alive"
    assert isinstance(outcomes[1].error, RankDiedError)
    assert "exit code 3" in str(outcomes[1].error)
    assert run_ranks(2, process_id) == kept


def test_a_function_inside_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match="top of a module"):
        run_ranks(2, lambda rank, world_size: rank)
