"""Saves and loads on a GPU, by what torch is made to say of one: threads work on the caller's streams, and copies through pinned
buffers are neither read before they are there nor written over before they are taken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shardembed.checkpoint import staging
from shardembed.checkpoint.format.workers import Scratch, spread
from shardembed.checkpoint.save import PendingSave
from shardembed.checkpoint.staging import Staging
from shardembed.checkpoint.together import together
from shardembed.comm import streams
from shardembed.errors import CheckpointError
from tests.unit.comm.fake_streams import FakeCuda, FakeStream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "default_stream", "set_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(streams, "at_home", fake.at_home)
    return fake


class FakeComm:
    """One that says on its own what several ranks say."""

    rank, world_size, timeout = 0, 2, 60.0

    def gather_texts(self, group: str, stage: str, text: str) -> list[str]:
        return [text, text]


def by_workers(seen: Callable[[], None], patience: float = 60.0) -> None:
    both = threading.Barrier(2)

    def work(task: int, scratch: Scratch) -> None:
        with suppress(threading.BrokenBarrierError):  # the other has not begun, and cannot
            both.wait(patience)
        seen()

    spread(range(2), work, workers=2)


def by_a_stage(seen: Callable[[], None]) -> None:
    comm: Any = FakeComm()
    together(comm, "write", lambda: seen() or "", long=True)


def by_a_save(seen: Callable[[], None]) -> None:
    def work() -> Path:
        by_a_stage(seen)
        return Path()

    PendingSave(work, lambda: None).wait()


@pytest.mark.parametrize(("way", "threads"), [(by_workers, 2), (by_a_stage, 1), (by_a_save, 1)])
def test_threads_of_a_checkpoint_work_on_the_streams_of_who_called(
    cuda: FakeCuda, way: Callable[[Callable[[], None]], None], threads: int
) -> None:
    mine, found = FakeStream(), list[tuple[int, FakeStream]]()
    with cuda.stream(mine):
        way(lambda: found.append((threading.get_ident(), cuda.current_stream())))
    assert [stream for _, stream in found] == [mine] * threads
    others = {thread for thread, _ in found} - {threading.get_ident()}
    assert others <= set(cuda.at_homes), "a thread that is told nothing works on the first GPU of the machine"
    assert others
    found.clear()
    way(lambda: found.append((threading.get_ident(), cuda.current_stream())))
    assert [stream for _, stream in found] == [cuda.main] * threads


def test_a_thread_that_cannot_begin_fails_the_work_and_hangs_nobody(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: Any) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(streams, "at_home", broken)
    for way in (by_a_stage, by_a_save):
        with pytest.raises(Exception, match="the device is lost"):
            way(lambda: None)
    with pytest.raises(RuntimeError, match="the device is lost"):
        by_workers(lambda: None, patience=0.1)


class Late:
    """A device whose copies are made when somebody waits for them, and not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Callable[[], object]] = []
        self.made = 0
        self.pinned: list[int] = []
        monkeypatch.setattr(staging, "_send", self.send)
        monkeypatch.setattr(staging, "_on_gpu", lambda tensor: True)
        monkeypatch.setattr(staging, "pinned", self.pin)

    def pin(self, size: int) -> torch.Tensor:
        self.pinned.append(size)
        return torch.full((size,), 77, dtype=torch.uint8)

    def send(self, part: torch.Tensor, landed: torch.Tensor) -> Any:
        self.asked.append(lambda: landed.copy_(part))
        number = len(self.asked)
        return SimpleNamespace(synchronize=lambda: self.make(number))

    def make(self, number: int) -> None:
        """All that was asked for up to this."""
        for copy in self.asked[self.made : number]:
            copy()
        self.made = max(self.made, number)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 11])
def test_copies_come_through_two_buffers_whole(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    late = Late(monkeypatch)
    monkeypatch.setattr(staging, "BUFFER_BYTES", 2 * 12)  # two rows
    data = torch.arange(3.0 * rows).view(rows, 3)
    shared = Staging()
    assert torch.equal(shared.copy(rows, lambda first, stop: data[first:stop]), data)
    wide = torch.arange(40.0).view(1, 40).bfloat16()  # a row that is longer than a buffer
    assert torch.equal(shared.copy(1, lambda first, stop: wide[first:stop]), wide)
    assert torch.equal(shared.copy(rows, lambda first, stop: data[first:stop]), data)
    assert len(late.pinned) <= 3, "buffers are pinned once, and anew only for a longer row"


def test_what_a_save_that_failed_had_promised_is_taken_back_by_who_waits_for_it() -> None:
    """Rows are noted by the main thread, and two threads that note at once lose some."""
    undone: list[int] = []

    def fail() -> Path:
        raise CheckpointError("the disk is full")

    pending = PendingSave(fail, lambda: undone.append(threading.get_ident()))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="the disk is full"):
            pending.wait()
    assert not undone
    with pytest.raises(CheckpointError, match="the disk is full"):
        pending.settle()
    assert undone == [threading.get_ident()]
