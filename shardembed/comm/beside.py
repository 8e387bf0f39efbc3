"""Work beside the main thread, one piece after the other: in a thread, or on a GPU's own stream.

A line goes on until a piece fails; what comes behind that is dropped, on all ranks alike, since a piece fails on all of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from queue import SimpleQueue
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of work.

    Attributes:
        value: what it returned.
        error: what it raised instead, which ended the line.
    """

    value: Any = None
    error: BaseException | None = None


def _done(work: Work) -> Outcome:
    try:
        return Outcome(work())
    except BaseException as error:  # whoever waits for the outcome is to hear of it, whatever it is
        return Outcome(error=error)


class Line:
    """Pieces of work in order, and their outcomes in the same order."""

    def submit(self, work: Work, given: Any) -> None:
        """Do `work` on `given`."""
        raise NotImplementedError  # both do

    def take(self) -> Outcome:
        """The next outcome, when it is there. Not to be asked for again after one that failed."""
        raise NotImplementedError  # both do

    def close(self) -> None:
        """Return when all that was submitted is done."""


def line_for(device: torch.device) -> Line:
    return OnStream(device) if device.type == "cuda" else InThread()


class InThread(Line):
    """In a thread of its own, which keeps nothing alive but what it works at."""

    def __init__(self) -> None:
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(self._work, self._outcomes), daemon=True, name="shardembed-prefetch")
        self._thread.start()

    def submit(self, work: Work, given: Any) -> None:
        self._work.put(work)

    def take(self) -> Outcome:
        return self._outcomes.get()

    def close(self) -> None:
        self._work.put(None)
        if threading.current_thread() is not self._thread:  # else garbage is collected there
            self._thread.join()


def _serve(pieces: SimpleQueue[Work | None], outcomes: SimpleQueue[Outcome]) -> None:
    failed = False
    while (work := pieces.get()) is not None:
        if not failed:
            outcome = _done(work)
            failed = outcome.error is not None
            outcomes.put(outcome)
            del outcome  # or a batch would live until the next one
        del work


class OnStream(Line):
    """At once, in the main thread, on a stream of its own: what the GPU computes elsewhere goes on meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)
        self._outcomes: deque[tuple[Outcome, Any]] = deque()
        self._failed = False

    def submit(self, work: Work, given: Any) -> None:
        if self._failed:
            return
        here = [tensor for tensor in tensors_in(given) if tensor.device.type == "cuda"]
        if here:  # somebody makes them there; from host memory there is nothing to wait for
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in here:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            outcome = _done(work)
            self._outcomes.append((outcome, self._stream.record_event()))
        self._failed = outcome.error is not None

    def take(self) -> Outcome:
        outcome, event = self._outcomes.popleft()
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        for tensor in tensors_in(outcome.value):
            if tensor.device.type == "cuda":
                tensor.record_stream(current)  # or its memory would be given away on the other stream too early
        return outcome


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a value made of dataclasses, containers and plain objects, each once."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, str | bytes | int | float | type | torch.nn.Module | None):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            if one.is_nested:
                yield from (one.values(), one.offsets())  # type: ignore[operator]
            else:
                yield one
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, tuple | list | set | frozenset):
            waiting += one
        elif is_dataclass(one):
            waiting += (getattr(one, field.name) for field in fields(one))
        elif hasattr(one, "__dict__"):
            waiting += vars(one).values()
