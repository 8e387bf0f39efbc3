"""What `profile` puts around the stages of a journey: seconds, bytes and calls of each, without those of the stages inside.

On the CPU by the host's clock; for a GPU by events on the stream that is current, which are read later, so that nothing waits.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import record_function

from shardembed.comm.comm import Comm
from shardembed.comm.stages import Name, Stage

KEPT = 256  # calls of each stage of which the time is kept one by one, the latest
PENDING = 512  # stages on a GPU whose events are not read yet


@dataclass
class Stretch:
    """What one stage took on this rank.

    Attributes:
        calls: how often it was entered.
        seconds: in it, without the stages inside.
        bytes: that this rank sent in it.
        collectives: how many ran in it.
        beside: it ran beside the main thread, in a thread or on a stream of its own.
        latest: seconds of the latest calls.
    """

    calls: int = 0
    seconds: float = 0.0
    bytes: int = 0
    collectives: int = 0
    beside: bool = False
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))


class Recorder:
    """Watches the stages of some journeys on one device."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._main = threading.current_thread()
        self._stream = torch.cuda.current_stream(device) if self._gpu else None
        self._open = threading.local()
        self._lock = threading.Lock()
        self._pending: deque[_Span] = deque()
        self.stretches: dict[Name, Stretch] = {}

    def stage_of(self, comm: Comm) -> Stage:
        """For the journeys on `comm`."""
        return lambda name: _Span(self, name, comm)

    def mark(self) -> Any:
        """Now, in the terms of `between`."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first: Any, last: Any) -> float:
        """Seconds."""
        if not self._gpu:
            return last - first
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def totals(self, comm: Comm) -> tuple[int, int]:
        """Collectives and bytes so far of whom this thread makes calls for."""
        if self._gpu:
            tallies = comm.tallies  # one thread makes all calls
        else:
            tallies = comm.tallies[:1] if threading.current_thread() is self._main else comm.tallies[1:]
        found = [tally.totals() for tally in tallies]
        return sum(calls for calls, _ in found), sum(sent for _, sent in found)

    def is_beside(self) -> bool:
        """Whether this is not where the user computes."""
        if self._gpu:
            return torch.cuda.current_stream() != self._stream
        return threading.current_thread() is not self._main

    def enter(self, span: _Span) -> None:
        self._stack().append(span)

    def leave(self, span: _Span) -> None:
        stack = self._stack()
        stack.pop()
        if stack:
            stack[-1].inner.append(span)
        with self._lock:
            self._pending.append(span)
            while len(self._pending) > (PENDING if self._gpu else 0):
                self._count(self._pending.popleft())

    def _stack(self) -> list[_Span]:
        if not hasattr(self._open, "stack"):
            self._open.stack = []
        return self._open.stack

    def finish(self) -> None:
        """Count what is still pending."""
        with self._lock:
            while self._pending:
                self._count(self._pending.popleft())

    def _count(self, span: _Span) -> None:
        own = span.elapsed(self.between) - sum(inner.elapsed(self.between) for inner in span.inner)
        stretch = self.stretches.setdefault(span.name, Stretch())
        stretch.calls += 1
        stretch.seconds += own
        stretch.latest.append(own)
        stretch.collectives += span.collectives - sum(inner.collectives for inner in span.inner)
        stretch.bytes += span.bytes - sum(inner.bytes for inner in span.inner)
        stretch.beside = stretch.beside or span.beside
        span.inner.clear()


class _Span(AbstractContextManager[None]):
    """One passage of a stage."""

    def __init__(self, recorder: Recorder, name: Name, comm: Comm) -> None:
        self.name: Name = name
        self.inner: list[_Span] = []
        self.collectives = self.bytes = 0
        self._recorder, self._comm = recorder, comm
        self._range = record_function(f"shardembed: {name}")
        self._first: Any = None
        self._last: Any = None
        self._seconds: float | None = None
        self.beside = False

    def elapsed(self, between: Callable[[Any, Any], float]) -> float:
        if self._seconds is None:
            self._seconds = between(self._first, self._last)
        return self._seconds

    def __enter__(self) -> None:
        self._range.__enter__()
        self._recorder.enter(self)
        self.beside = self._recorder.is_beside()
        self.collectives, self.bytes = self._recorder.totals(self._comm)
        self._first = self._recorder.mark()

    def __exit__(self, *error: object) -> None:
        self._last = self._recorder.mark()
        collectives, sent = self._recorder.totals(self._comm)
        self.collectives, self.bytes = collectives - self.collectives, sent - self.bytes
        self._recorder.leave(self)
        self._range.__exit__(None, None, None)
