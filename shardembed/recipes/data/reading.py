"""A rank's parts of the global batches that it trains on, made in this process or ahead of it in worker processes.

Either way they are the same, in the same order: of n workers, worker w makes the parts of steps w, w + n, ... Which rows a batch
holds is known only once all rows before it have been shuffled, so each worker reads the whole stream, and what more than one share
is making parts of batches: ids from raw values, above all.

The position in the data is the number of steps that were trained. What workers have made ahead is no part of it: it is dropped
with them, and made again after a restart.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import queues, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from shardembed.comm import lifeline
from shardembed.errors import ShardEmbedError, WorkerError, rebuild, travels
from shardembed.kernels.memory import keep_freed_memory
from shardembed.recipes.data.part import Part

# Workers start as new processes. A rank has threads, of Gloo, of OpenMP, of CUDA, and what one of them has locked when a process is
# forked stays locked in the copy for ever. A fork server would have none, but its workers are not our children, so the system
# would not end them with us; and all are started once a job, so it would save nothing.
START = "spawn"
DYING_SECONDS = 5.0
MORE_ROOM = (
    "Give shared memory (/dev/shm) more room, for example by docker run --shm-size=1g, or set data.workers: 0, by which ranks read "
    "between steps"
)
NO_LEAKS = "ignore::UserWarning:multiprocessing.resource_tracker"


@dataclass(frozen=True)
class Stream:
    """What a rank trains on; pickled to workers.

    Attributes:
        epoch: the global batches of an epoch, `steps_per_epoch` of them, by its number.
        part: what a rank takes of a global batch, by rank and world size.
        steps_per_epoch: how many batches that is.
        rank: this one.
        world_size: of the job.
        burst: batches that come at once from `epoch`, before the next one takes longer: made ahead, with two a worker as the least.
    """

    epoch: Callable[[int], Iterator[Any]]
    part: Callable[[Any, int, int], Part]
    steps_per_epoch: int
    rank: int
    world_size: int
    burst: int = 1

    def parts(self, steps: range, worker: int = 0, workers: int = 1) -> Iterator[Part]:
        """Those of steps[worker], steps[worker + workers], and so on."""
        began, skipped = divmod(steps.start, self.steps_per_epoch)
        epochs = range(began, -(-steps.stop // self.steps_per_epoch))
        chunks = (chunk for epoch in epochs for chunk in islice(self.epoch(epoch), skipped if epoch == began else 0, None))
        for chunk in islice(chunks, worker, len(steps), workers):
            yield self.part(chunk, self.rank, self.world_size)


def read(stream: Stream, steps: range, workers: int, device: torch.device) -> Generator[Part, None, None]:
    """The parts of `steps`, on the CPU, pinned where `device` is a GPU. Close it to end the workers.

    Raises:
        WorkerError: a worker was killed, or cannot hand over what it made. What a worker itself raises is raised here, in its place
            in the order.
    """
    loader = DataLoader(
        _Parts(stream, steps),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=max(2, -(-stream.burst // workers)) if workers else None,
        multiprocessing_context=START if workers else None,
        worker_init_fn=partial(_begin_worker, os.getpid()),
        generator=torch.Generator(),  # else it would draw from the one that training draws from
    )
    others = set(multiprocessing.active_children())
    processes: list[BaseProcess] = []
    try:
        try:
            with _starting() if workers else nullcontext():
                made = iter(loader)
        except OSError as error:
            raise WorkerError(
                f"rank {stream.rank}: cannot start {workers} processes that read data: {error}. {MORE_ROOM}"
            ) from error
        processes = [process for process in multiprocessing.active_children() if process not in others]
        while True:
            try:
                found = next(made)
            except StopIteration:
                return
            except Exception as error:
                # Depending on where it was, torch speaks of a refused connection.
                _explain(stream.rank, processes, error)
                raise
            if isinstance(found, _Failure):
                raise rebuild(found.name, found.text)
            yield found
    finally:
        made = None  # which lets workers come to an end
        for process in processes:  # an error on its way holds on to the loader, and so to them
            process.kill()
            process.join()


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker; torch would put a traceback around the message."""

    name: str
    text: str


class _Parts(IterableDataset):
    def __init__(self, stream: Stream, steps: range) -> None:
        self._stream, self._steps = stream, steps

    def __iter__(self) -> Iterator[Part | _Failure]:
        worker = get_worker_info()
        if worker is None:
            yield from self._stream.parts(self._steps)
            return
        try:
            for part in self._stream.parts(self._steps, worker.id, worker.num_workers):
                yield self._handed_over(part)
        except ShardEmbedError as error:
            yield _Failure(*travels(error))

    def _handed_over(self, part: Part) -> Part:
        """In shared memory already: torch would put it there in a thread, where an error is printed, the part lost, and the rank
        would wait for it for ever.
        """
        try:
            return part.share_memory()
        except RuntimeError as error:
            raise WorkerError(
                f"rank {self._stream.rank}: a worker that reads data cannot hand over a batch of {part.nbytes:,} bytes: {error}. "
                f"{MORE_ROOM}"
            ) from error


def _begin_worker(parent: int, number: int) -> None:
    # A rank that is killed can end nobody, and torch's workers look for their parent only now and then.
    lifeline.end_with(parent)
    # What cannot be sent is lost, and the rank waits for it: better to be seen dying.
    queues.Queue._on_queue_feeder_error = staticmethod(_end_worker)  # pyright: ignore[reportAttributeAccessIssue]
    keep_freed_memory()  # as ranks do: reading takes nearly twice the time without


def _end_worker(error: Exception, part: object) -> None:
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def _starting() -> Iterator[None]:
    """While workers start."""
    _start_tracker()
    posix = sys.platform != "win32"
    on_main = threading.current_thread() is threading.main_thread()
    # Ctrl-C goes to all processes of a terminal. Ours ends the workers; their own tracebacks would say nothing. They inherit what
    # is blocked, while one that comes meanwhile waits here.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if posix else set()
    # torch's handler would raise the death of a worker anywhere in our code, such as in a collective, whose errors have meanings of
    # their own. Whoever waits for a batch notices too.
    handler = signal.getsignal(signal.SIGCHLD) if posix and on_main else None
    try:
        yield
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)
        if posix:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _start_tracker() -> None:
    """Start Python's own process that removes the semaphores of processes which were killed. It would warn of every one, after and
    above the message that matters; and starting it later would unblock Ctrl-C.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = f"{before},{NO_LEAKS}" if before else NO_LEAKS
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _explain(rank: int, processes: list[BaseProcess], error: Exception) -> None:
    """
    Raises:
        WorkerError: a worker is dead.
    """
    if isinstance(error, OSError | EOFError):  # a worker closes its connections a moment before it is dead
        ended = wait([process.sentinel for process in processes], DYING_SECONDS)
        for process in processes:
            if process.sentinel in ended:
                process.join(DYING_SECONDS)  # its exit code is there a moment later
    code = next((process.exitcode for process in processes if process.exitcode), None)
    if code is None:
        return
    said = f"ended with exit code {code}; look above for what it printed"
    if code < 0:
        said = f"was killed by {signal.Signals(-code).name}; if memory ran out, use fewer workers or a smaller data.shuffle_buffer"
        if -code == signal.SIGBUS:
            said = "was killed by SIGBUS, as happens when shared memory (/dev/shm) is full; give the container more"
    raise WorkerError(f"rank {rank}: a worker that reads data {said}. With data.workers: 0 there are none") from error
