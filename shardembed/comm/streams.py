"""How memory passes between the main thread's stream and that of work beside it.

What is made on one stream may be used on another only behind an event of the first that the other waits for; and its memory, which
the allocator gives to the next who asks on the stream where it was made, must be kept until the other is through with it
(`Tensor.record_stream`). On the CPU what a thread has returned is done, and there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from shardembed.comm.threads import at_home

Event = Any  # of torch.cuda; None where there is nothing to wait for
URGENT = -1  # priority: what is routed there is small, and a host waits for it, while the other stream is full of kernels


class Side:
    """Where work beside the main thread runs; here, on the host."""

    def begin(self) -> None:
        """In the thread beside, first of all."""

    def lend(self, given: Any) -> Event:
        """In the main thread: `given` is to be used beside it, from this event on."""
        return None

    def working(self, ready: Event) -> AbstractContextManager[None]:
        """In any thread: what is asked of the device in here comes behind `ready`, and beside the main thread's stream."""
        return nullcontext()

    def mark(self) -> Event:
        """While working: what has been asked for so far."""
        return None

    def fetch(self, value: Any, done: Event) -> None:
        """In the main thread: `value`, which is there from this event on, is to be used."""


def handed_over() -> Callable[[], None]:
    """Called in the thread that starts others: what each of those is to call first, so that what they ask of a GPU comes behind all
    that this thread has asked for, and what it asks afterwards behind theirs. They then use its streams, and its device.
    """
    if not torch.cuda.is_initialized():
        return nothing
    device = torch.device("cuda", torch.cuda.current_device())
    all_streams = ((number, torch.cuda.current_stream(number)) for number in range(torch.cuda.device_count()))
    # A thread begins with default streams; to set those would take memory of GPUs that this process has nothing to do with.
    streams = [stream for number, stream in all_streams if stream != torch.cuda.default_stream(number)]

    def take_over() -> None:
        for stream in streams:
            torch.cuda.set_stream(stream)
        at_home(device)

    return take_over


def nothing() -> None:
    """What the main thread calls in its stead, being there already."""


def side_for(device: torch.device) -> Side:
    return OnStream(device) if device.type == "cuda" else Side()


class OnStream(Side):
    """On a stream of its own, which several threads may ask for work: it is done in the order in which they do."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device, priority=URGENT)

    def begin(self) -> None:
        at_home(self._device)

    def lend(self, given: Any) -> Event:
        here = self._on_device(given)
        if not here:  # from host memory there is nothing to wait for, and the main thread's stream may be far behind
            return None
        for tensor in here:
            tensor.record_stream(self._stream)
        return torch.cuda.current_stream(self._device).record_event()

    @contextmanager
    def working(self, ready: Event) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            yield

    def mark(self) -> Event:
        return self._stream.record_event()

    def fetch(self, value: Any, done: Event) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(done)
        for tensor in self._on_device(value):
            tensor.record_stream(current)

    def _on_device(self, value: Any) -> list[torch.Tensor]:
        return [tensor for tensor in tensors_in(value) if tensor.device.type == self._device.type]


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
