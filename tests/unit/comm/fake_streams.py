"""Streams that are none: what is asked of them is noted, and every use of a tensor is held to what it must be preceded by.

A stream counts what was asked of it. What it has seen of the others follows from the events that it waited for, as with the clocks
of distributed programs; a use of what another stream has made needs that to be seen, and its memory to be kept.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class FakeEvent:
    """What a stream, and through it others, had done when it was recorded."""

    seen: dict[int, int]


@dataclass(eq=False)
class FakeStream:
    """Of a device."""

    device: Any = None
    priority: int = 0
    asked: int = 0
    seen: dict[int, int] = field(default_factory=dict)

    def ask(self) -> int:
        self.asked += 1
        self.seen[id(self)] = self.asked
        return self.asked

    def record_event(self) -> FakeEvent:
        return FakeEvent(dict(self.seen))

    def wait_event(self, event: FakeEvent) -> None:
        for stream, number in event.seen.items():
            self.seen[stream] = max(number, self.seen.get(stream, 0))


class FakeCuda:
    """What `streams` uses of torch.cuda."""

    def __init__(self) -> None:
        self.main = FakeStream()
        self.streams = [self.main]
        self._current = threading.local()
        self._made: dict[int, tuple[FakeStream, int]] = {}
        self._kept: set[tuple[int, int]] = set()
        self._alive: list[torch.Tensor] = []
        self.at_homes: list[int] = []

    def Stream(self, device: Any, priority: int = 0) -> FakeStream:
        self.streams.append(FakeStream(device, priority))
        return self.streams[-1]

    def at_home(self, device: Any) -> None:
        """`threads.at_home`."""
        self.at_homes.append(threading.get_ident())

    def current_stream(self, device: Any = None) -> FakeStream:
        return getattr(self._current, "stream", self.main)

    def default_stream(self, device: Any = None) -> FakeStream:
        return self.main

    def set_stream(self, stream: FakeStream) -> None:
        self._current.stream = stream

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        yield
        self._current.stream = before

    def keep(self, tensor: torch.Tensor, stream: FakeStream) -> None:
        """`Tensor.record_stream`."""
        self._kept.add((id(tensor), id(stream)))

    def make(self) -> torch.Tensor:
        """A tensor, by a kernel on the current stream."""
        tensor = torch.zeros(1)
        stream = self.current_stream()
        self._made[id(tensor)] = stream, stream.ask()
        self._alive.append(tensor)
        return tensor

    def use(self, tensor: torch.Tensor) -> None:
        """By a kernel on the current stream."""
        here = self.current_stream()
        where, number = self._made[id(tensor)]
        here.ask()
        if where is not here:
            assert here.seen.get(id(where), 0) >= number, "used before it is there"
            assert (id(tensor), id(here)) in self._kept, "its memory may be given away while it is used"
