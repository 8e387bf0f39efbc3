"""A few threads that share a stream of tasks. Hashing, copying and file access all let other threads run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from shardembed.comm.streams import handed_over, nothing

Task = TypeVar("Task")


class Scratch:
    """A worker's own memory, used again for every task: it grows to the largest and no further."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int, pinned: bool = False) -> torch.Tensor:
        """pinned: a GPU is to write there, and does so by itself then."""
        if len(self._bytes) < size or self._bytes.is_pinned() < pinned:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # let the old one go first
            self._bytes = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        return self._bytes[:size]


def spread(tasks: Iterable[Task], work: Callable[[Task, Scratch], None], workers: int) -> None:
    """Call `work` for each task, on `workers` threads. The first error stops all of them and is raised here."""
    stream, lock = iter(tasks), threading.Lock()
    errors: list[BaseException] = []
    stop = threading.Event()

    begin = handed_over()

    def serve(begin: Callable[[], None]) -> None:
        scratch = Scratch()
        try:
            begin()
            with torch.no_grad():  # holds for one thread
                while not stop.is_set():
                    with lock:
                        task = next(stream, None)
                    if task is None:
                        return
                    work(task, scratch)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=serve, args=(begin,), name="checkpoint", daemon=True) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    try:
        serve(nothing)
        for thread in threads:
            thread.join()
    finally:
        stop.set()  # Ctrl-C while waiting: let the others end after the task at hand
    if errors:
        raise errors[0]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the CPU."""
    return tensor.numpy().data
