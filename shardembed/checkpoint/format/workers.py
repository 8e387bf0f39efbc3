"""A few threads that share a stream of tasks. Hashing, copying and file access all let other threads run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Task = TypeVar("Task")


class Scratch:
    """A worker's own memory, used again for every task: it grows to the largest and no further."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> torch.Tensor:
        if len(self._bytes) < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # let the old one go first
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size]


def spread(tasks: Iterable[Task], work: Callable[[Task, Scratch], None], workers: int) -> None:
    """Call `work` for each task, on `workers` threads. The first error stops all of them and is raised here."""
    stream, lock = iter(tasks), threading.Lock()
    errors: list[BaseException] = []
    stop = threading.Event()

    def serve() -> None:
        scratch = Scratch()
        try:
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

    threads = [threading.Thread(target=serve, name="checkpoint", daemon=True) for _ in range(workers - 1)]
    for thread in threads:
        thread.start()
    try:
        serve()
        for thread in threads:
            thread.join()
    finally:
        stop.set()  # Ctrl-C while waiting: let the others end after the task at hand
    if errors:
        raise errors[0]


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor on the CPU."""
    return tensor.numpy().data
