"""Memory passes between the main thread's stream and that of a line only behind events, and is kept while it is used."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from shardembed.comm import streams
from shardembed.comm.beside import Line
from shardembed.comm.streams import OnStream, Side
from tests.unit.comm.fake_streams import FakeCuda

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(streams, "at_home", fake.at_home)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: fake.keep(tensor, stream))
    return fake


@dataclass
class Made:
    """What a piece of work has made, as a ticket holds it."""

    tensor: torch.Tensor
    more: Any = None


def loop(cuda: FakeCuda, side: Side, depth: int, pieces: int = 5) -> None:
    """As `prefetched` does it: read, submit, take, finish, use."""
    line, coming = Line(side), []

    def submit() -> None:
        batch = cuda.make()

        def work() -> Made:
            cuda.use(batch)
            assert threading.current_thread() is not threading.main_thread()
            return Made(cuda.make())

        def finish(made: Made) -> None:
            cuda.use(made.tensor)
            assert threading.current_thread() is threading.main_thread()
            made.more = [cuda.make()]

        coming.append((batch, finish))
        line.submit(work, {"batch": batch})

    for number in range(pieces):
        while len(coming) <= depth and number + len(coming) < pieces:
            submit()
        batch, finish = coming.pop(0)
        outcome = line.take(finish)
        assert outcome.error is None, outcome.error
        for tensor in (batch, outcome.value.tensor, *outcome.value.more):
            cuda.use(tensor)
    line.close()


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_what_crosses_is_there_and_stays(cuda: FakeCuda, depth: int) -> None:
    loop(cuda, OnStream(CPU), depth)
    main, beside = cuda.streams
    assert main.asked
    assert beside.asked
    assert beside.priority == streams.URGENT
    assert len(cuda.at_homes) == 1  # a thread that forgets it works on the first GPU of the machine
    assert threading.get_ident() not in cuda.at_homes


class Without(OnStream):
    """One that leaves a part out."""

    def __init__(self, part: str) -> None:
        super().__init__(CPU)
        setattr(self, part, getattr(Side(), part))


@pytest.mark.parametrize("part", ["lend", "mark", "fetch"])
def test_a_part_that_is_left_out_is_found(cuda: FakeCuda, part: str) -> None:
    with pytest.raises((AssertionError, AttributeError)):
        loop(cuda, Without(part), 1)


def test_memory_that_is_not_kept_is_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    with pytest.raises(AssertionError, match="may be given away"):
        loop(cuda, OnStream(CPU), 1)


def test_a_batch_in_host_memory_waits_for_nothing(cuda: FakeCuda) -> None:
    side = OnStream(torch.device("cuda"))  # where this tensor does not lie
    cuda.main.ask()
    assert side.lend([torch.zeros(1)]) is None
    with side.working(None):
        assert not cuda.current_stream().seen
