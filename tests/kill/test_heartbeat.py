"""The heartbeat: what it says of ranks that are dead, stopped or hang elsewhere, and whom it leaves alone.

Gloo calls can be interrupted and need no heartbeat; here they stand for calls that cannot, with Gloo's own time limit far away.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import shardembed as se
from shardembed.comm import comm as comms
from shardembed.comm.diagnosis import Place, own_store
from shardembed.comm.heartbeat import Watch
from shardembed.errors import CollectiveError
from tests.amount import exhaustive
from tests.jobs import wait_until
from tests.kill.nursery import Ended, run_forked

PATIENCE = 10.0  # a beat every 1.25 s: so long that no machine is too busy to give three of them
LIMIT = 3.2  # eight beats; three of them missed in a row are a rank that is dead, or a machine that is very busy


def reduce(comm: se.Comm, stage: str) -> None:
    comm.all_reduce(stage, torch.ones(1))


def hang() -> None:
    threading.Event().wait()


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def show_life(comm: se.Comm) -> None:
    """One beat more, now: the next one would be due in a moment, and this rank may not live to it."""
    assert comm._heartbeat is not None
    comm._heartbeat._beat()


def send(comm: se.Comm) -> None:
    comm.all_to_all("forward", "another call", torch.ones(comm.world_size), [1] * comm.world_size, [1] * comm.world_size)


ODD: dict[str, Callable[[se.Comm], object]] = {
    "stopped": lambda comm: stop(),
    "hangs": lambda comm: hang(),
    "elsewhere": send,
}


def go_wrong(rank: int, world_size: int, odd: int, what: str, sign: Path) -> None:
    comm = se.init(timeout=LIMIT, heartbeat=True)
    for step in range(3):
        comm.history.stand_at(step)
        reduce(comm, "all is well")
    if rank == odd:
        show_life(comm)
        sign.touch()
        ODD[what](comm)
    wait_until(sign.exists)
    # Gloo notices when another rank ends; a GPU that waits for NCCL does not.
    with mock.patch.object(se.Comm, "_reports", side_effect=lambda here: hang()):
        reduce(comm, "one is missing")


def run(folder: Path, world_size: int, odd: int, what: str) -> list[Ended]:
    ended = run_forked(world_size, go_wrong, odd, what, folder / "sign", stopped=() if what == "elsewhere" else (odd,))
    for rank, end in enumerate(ended):
        if rank != odd:
            assert end.code == 1, f"rank {rank}: exit code {end.code}\n{end.traceback}{end.stderr}"
            assert end.error is None, f"rank {rank} raised: {end.error}"
            here = f"shardembed: error: rank {rank} has waited "
            assert here in end.stderr, end.stderr
            assert end.stderr.count("shardembed: error: ") == 1, end.stderr
            assert " s in stage 'one is missing' (all_reduce), forward call 0, optimizer step 2, and the call did not" in end.stderr
    return [end for rank, end in enumerate(ended) if rank != odd]


def found_by_all(ended: list[Ended], text: str) -> bool:
    """One that gives up tells the others, and what it found is in what they say."""
    return all(text in end.stderr for end in ended)


def test_a_rank_without_a_sign_of_life_is_named(tmp_path: Path) -> None:
    ended = run(tmp_path, 3, 1, "stopped")
    assert found_by_all(ended, "Missing: rank(s) [1] give no sign of life"), ended
    assert found_by_all(ended, "Rank 1 was last heard outside of collectives, after stage 'all is well'"), ended


@pytest.mark.matrix
def test_a_stopped_rank_that_hosts_the_store_is_named(tmp_path: Path) -> None:
    ended = run(tmp_path, 3, 0, "stopped")
    assert found_by_all(ended, "The store where ranks meet does not answer: rank 0, which hosts it unless a launcher does,"), ended


def test_a_rank_that_hangs_outside_of_collectives_is_named(tmp_path: Path) -> None:
    ended = run(tmp_path, 3, 2, "hangs")
    assert found_by_all(ended, "Rank 2 has been outside of collectives for "), ended
    assert found_by_all(ended, "after stage 'all is well' (all_reduce), forward call 0, optimizer step 2: it hangs, or is late"), (
        ended
    )
    assert not any("Missing" in end.stderr for end in ended)


@pytest.mark.matrix
def test_a_rank_that_waits_in_another_call_is_named(tmp_path: Path) -> None:
    ended = run(tmp_path, 2, 1, "elsewhere")
    # Whichever of the two gives up first says it.
    assert found_by_all(ended, "in stage 'another call' (all_to_all), forward call 0, optimizer step 2"), ended


def return_too_early(rank: int, world_size: int, dies: bool) -> None:
    """On rank 0 a collective returns and is never done, as on a GPU whose peer is gone."""
    comm = se.init(timeout=LIMIT, heartbeat=True)

    def never(device: torch.device) -> Any:
        return lambda: False

    if rank == 0:
        with mock.patch.object(comms, "device_is_through", never):
            reduce(comm, "on a device")
        hang()  # in the driver
    reduce(comm, "on a device")
    show_life(comm)
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    hang()


@pytest.mark.matrix
@pytest.mark.parametrize("dies", [False, True])
def test_a_call_that_returned_and_is_not_done_counts_as_waiting(dies: bool) -> None:
    first, other = run_forked(2, return_too_early, dies, stopped=(1,))
    assert (first.code, other.code) == (1, -signal.SIGKILL), (first, other)
    assert "rank 0 has waited" in first.stderr
    assert "in stage 'on a device'" in first.stderr
    last = "was last heard outside of collectives, after stage 'on a device'" if dies else "has been outside of collectives for"
    assert f"Rank 1 {last}" in first.stderr
    assert ("Missing: rank(s) [1] give no sign of life" in first.stderr) is dies


def compute_long(rank: int, world_size: int) -> float:
    comm = se.init(timeout=LIMIT / 2, heartbeat=True)
    reduce(comm, "before")
    threading.Event().wait(LIMIT)  # computing, on all ranks
    return float(comm.all_reduce("after", torch.ones(1)))


def test_ranks_that_compute_for_longer_than_the_limit_are_left_alone() -> None:
    assert [(end.code, end.value) for end in run_forked(2, compute_long)] == [(0, 2.0)] * 2


def draw_long(rank: int, world_size: int, beating: bool, odd: str) -> str:
    """Rank 1 takes longer than the limit for what the others have done at once, or has an error, or is stopped."""
    limit = LIMIT / 2 if odd == "stopped" else PATIENCE
    comm = se.init(timeout=limit, heartbeat=beating or None)
    try:
        with comm.patiently("draw"):
            if rank == 1:
                if odd == "stopped":
                    show_life(comm) if beating else wait_until(lambda: stands(comm))
                    stop()
                if odd == "fails":
                    raise ValueError("no such distribution")
                threading.Event().wait(1.2 * limit)
    except (ValueError, CollectiveError) as error:
        return f"{type(error).__name__}: {error}"
    return str(float(comm.all_reduce("after", torch.ones(1))))


def stands(comm: se.Comm) -> bool:
    """The heartbeat of the wait alone has given its first sign of life."""
    return own_store(f"beat/{comm._name}").check([str(comm.rank)])


@pytest.mark.parametrize("beating", [False, exhaustive(True)], ids=["then alone", "always"])
def test_ranks_wait_for_one_that_draws_for_longer_than_the_limit(beating: bool) -> None:
    assert [(end.code, end.value) for end in run_forked(2, draw_long, beating, "")] == [(0, "2.0")] * 2


def test_an_error_of_one_that_draws_is_everybodys() -> None:
    first, second = (end.value for end in run_forked(2, draw_long, False, "fails"))
    assert first == "CollectiveError: rank 0 stops in 'draw', where others have failed: rank 1, ValueError: no such distribution"
    assert second == "ValueError: no such distribution"


@pytest.mark.parametrize("beating", [True, False], ids=["always", "then alone"])
def test_one_that_is_stopped_while_it_draws_is_named(beating: bool) -> None:
    first, _ = run_forked(2, draw_long, beating, "stopped", stopped=(1,))
    assert first.code == 1, first
    assert "rank 0 has waited " in first.stderr
    assert "in stage 'draw' (all_to_all), forward call 0, optimizer step 0, and the call did not complete" in first.stderr
    assert "Missing: rank(s) [1] give no sign of life" in first.stderr


def place(stage: str) -> Place:
    return Place("all_reduce", stage, "", 1, 2)


def test_a_watch_tells_the_oldest_call_that_is_not_done() -> None:
    watch, done = Watch(), {"a": False, "b": False}
    assert watch.oldest()[:2] == (None, False)
    for name in done:
        watch.leave(watch.enter(place(name)), lambda name=name: done[name])
    inside = watch.enter(place("c"))
    assert watch.oldest()[:2] == (place("a"), True)
    done["b"] = True  # it was queued behind the other, which is not
    assert watch.oldest()[:2] == (place("a"), True)
    done["a"] = True
    assert watch.oldest()[:2] == (place("c"), True)
    watch.leave(inside)
    assert watch.oldest()[:2] == (place("c"), False)


def test_a_call_that_was_queued_does_not_wait_before_its_turn() -> None:
    done = {"a": False, "b": False}
    with mock.patch("shardembed.comm.heartbeat.time.monotonic", return_value=100.0) as clock:
        watch = Watch()
        for name in done:
            watch.leave(watch.enter(place(name)), lambda name=name: done[name])
        clock.return_value = 150.0
        assert watch.oldest() == (place("a"), True, 50.0)
        done["a"] = True
        assert watch.oldest() == (place("b"), True, 0.0)
        clock.return_value = 151.0
        assert watch.oldest() == (place("b"), True, 1.0)


def test_a_call_that_fails_is_over() -> None:
    watch = Watch()

    def fail() -> None:
        with watch.during(place("a"), lambda: lambda: False, patient=True):
            assert watch.is_patient()
            raise RuntimeError("a rank is gone")

    with pytest.raises(RuntimeError, match="a rank is gone"):
        fail()
    assert watch.oldest()[:2] == (place("a"), False)
    assert not watch.is_patient()
    with watch.during(place("b"), lambda: lambda: False, patient=False):
        pass
    assert watch.oldest()[:2] == (place("b"), True), "the device is not through"
