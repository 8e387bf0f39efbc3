"""Which rank hangs, where waiting cannot be interrupted: a thread a rank that shows signs of life and watches its own main thread.

A collective on a GPU returns before it is done, and what waits for it sits in the driver, where no error can reach it. So each
rank's thread writes a beat to the job's store every few seconds: a count, and where the main thread stands. Nothing is written a
stage. When the main thread has stood in one collective for longer than the time limit, its thread looks whose beats have stopped
(dead, or stopped), and where the others stand (hung in another place), prints that, and ends the process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import NoReturn

import torch
import torch.distributed as dist

from shardembed.comm.diagnosis import STORE_SECONDS, Lost, Place, UnansweredError, lost_store, own_store, within
from shardembed.config.shown import printable
from shardembed.errors import SAME_CALLS

BEAT_SECONDS = 5.0
HEADSTART = 30.0  # seconds by which NCCL's own watchdog, which names nobody, comes later
LOOKS = 3  # beats that a rank may miss before it counts as dead or stopped
FIRST = "first"  # key: what the first rank that gave up says


@dataclass
class Standing:
    """A thread in one collective.

    Attributes:
        place: where it stands.
        since: when it began to wait for other ranks, by the monotonic clock.
        done: whether the device is through; None while the call has not returned.
        patient: it may last as long as all others show signs of life.
    """

    place: Place
    since: float
    done: Callable[[], bool] | None = None
    patient: bool = False


class Watch:
    """What the main thread waits for, oldest first: it enters and leaves, the heartbeat looks."""

    def __init__(self) -> None:
        self._standing: deque[Standing] = deque()
        self._lock = threading.Lock()
        self._left = time.monotonic()
        self._last: Place | None = None

    def enter(self, place: Place, patient: bool = False) -> Standing:
        standing = Standing(place, time.monotonic(), patient=patient)
        with self._lock:
            self._drop_done()
            self._standing.append(standing)
        return standing

    def leave(self, standing: Standing, done: Callable[[], bool] | None = None) -> None:
        """The call has returned; the device may still be at it, as `done` says."""
        with self._lock:
            standing.done = done or _yes
            self._drop_done()

    @contextmanager
    def during(self, place: Place, through: Callable[[], Callable[[], bool] | None], patient: bool) -> Iterator[None]:
        """The call is made in here. through: gives `done` once it has returned; one that fails is over."""
        standing, done = self.enter(place, patient), None
        try:
            yield
            done = through()
        finally:
            self.leave(standing, done)

    def oldest(self) -> tuple[Place | None, bool, float]:
        """The place, whether the main thread still waits there, and for how long it has, or how long ago it left."""
        with self._lock:
            self._drop_done()
            if self._standing:
                return self._standing[0].place, True, time.monotonic() - self._standing[0].since
            return self._last, False, time.monotonic() - self._left

    def is_patient(self) -> bool:
        """Whether the main thread waits, if it does, in something that has no time limit."""
        with self._lock:
            return bool(self._standing) and self._standing[0].patient

    def _drop_done(self) -> None:
        while self._standing and (done := self._standing[0].done) is not None and done():
            self._last, self._left = self._standing.popleft().place, time.monotonic()
            if self._standing:  # it was queued behind this one and has waited for it, not for other ranks
                self._standing[0].since = max(self._standing[0].since, self._left)


def _yes() -> bool:
    return True


def device_is_through(device: torch.device) -> Callable[[], bool] | None:
    """Whether the device has done what was asked of it so far, to be asked from any thread; None for the CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))

    def through() -> bool:
        try:
            return event.query()
        except RuntimeError:  # a broken device: the main thread will say so
            return True

    return through


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        count: beats of the rank so far.
        place: where its main thread stands, or stood last; empty before its first collective.
        waits: whether it still waits there.
        seconds: for how long it has waited, or how long ago it left.
    """

    count: int
    place: str
    waits: bool
    seconds: float


@dataclass
class Heard:
    """What was last heard of a rank.

    Attributes:
        beat: its latest.
        still: looks in a row that have found no newer one.
    """

    beat: Beat
    still: int = 0


class Heartbeat:
    """The thread of one rank.

    Args:
        name: of the group, the same on all its ranks and no other's.
        limit: seconds that a collective may take.
        begin: what the thread does first of all (`threads.at_home`).
        end: what to do with the text in the end; by default print it and end the process.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        name: str,
        limit: float,
        watch: Watch,
        begin: Callable[[], object] | None = None,
        end: Callable[[str], object] | None = None,
    ) -> None:
        self.rank, self.world_size, self.limit, self.watch = rank, world_size, limit, watch
        self.seconds = min(BEAT_SECONDS, limit / 8)
        self._begin, self._end = begin or _yes, end or end_process
        self._name = name
        self._known_store: dist.Store | None = None
        self._count = 0
        self._heard: dict[int, Heard] = {}
        self._looks = 0
        self._until = limit
        self._lost: Lost | None = None
        self._open: threading.Thread | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="shardembed-heartbeat")
        self._thread.start()

    def stop(self) -> None:
        """Give no more signs of life."""
        self._stopped.set()
        self._thread.join(STORE_SECONDS)

    def _run(self) -> None:
        self._begin()
        while not self._stopped.wait(self.seconds):
            self._beat()
            place, waits, seconds = self.watch.oldest()
            if place is None or not waits or seconds < 2 * self.seconds:
                self._wait_until(self.limit)
                continue
            first = self._ask(self._first)
            if seconds > self._until - (LOOKS + 1) * self.seconds or first:
                self._looks += 1
                self._ask(self._look)
            # A thread that was kept from running has not looked often enough to tell who is silent.
            if first or (seconds > self._until and self._looks >= LOOKS):
                if not first and self.watch.is_patient() and self._lost is None and not self._silent:
                    self._wait_until(seconds + self.limit)  # not at each beat: ranks that wait all ask one store for all others
                    continue
                self._give_up(place, seconds, first)
                return

    def _wait_until(self, seconds: float) -> None:
        """Nobody is under suspicion until the main thread has waited for so long."""
        self._heard, self._looks, self._until = {}, 0, seconds

    @property
    def _store(self) -> dist.Store:
        """Used in `_ask` alone: connecting may hang, too."""
        if self._known_store is None:
            self._known_store = own_store(f"beat/{self._name}")
        return self._known_store

    def _ask(self, question: Callable[[], str | None]) -> str | None:
        """Ask the store something; None where it cannot answer. A question that it leaves open blocks the connection until it
        answers, so none is asked before.
        """
        if self._open is not None and self._open.is_alive():
            return None
        self._open, self._lost = None, None
        try:
            return within(STORE_SECONDS, question)
        except UnansweredError as error:
            self._open, self._lost = error.thread, "silent"
        except RuntimeError:
            self._lost = "gone"
        return None

    def _beat(self) -> None:
        self._count += 1
        place, waits, seconds = self.watch.oldest()  # in this thread, and not in that of `_ask`: it asks the device
        beat = json.dumps(asdict(Beat(self._count, str(place) if place else "", waits, seconds)))
        self._ask(lambda: self._store.set(str(self.rank), beat))

    def _first(self) -> str | None:
        return self._store.get(FIRST).decode() if self._store.check([FIRST]) else None

    def _look(self) -> None:
        """Hear the other ranks. Only in need: it asks the store as often as there are ranks."""
        for rank in range(self.world_size):
            if rank == self.rank or not self._store.check([str(rank)]):
                continue
            beat = Beat(**json.loads(self._store.get(str(rank))))
            known = self._heard.get(rank)
            if known is None or known.beat.count != beat.count:
                self._heard[rank] = Heard(beat)
            else:
                known.still += 1

    def _give_up(self, place: Place, seconds: float, first: str | None) -> None:
        text = self._explain(place, seconds, first)
        if not first:
            self._ask(lambda: self._store.set(FIRST, text))
        if not first or self.rank == 0:
            # The others hear of it at their next beats, and from the store, which may end with this rank.
            self._stopped.wait(2 * self.seconds)
        self._end(text)

    @property
    def _silent(self) -> list[int]:
        """Ranks whose beats have stopped."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        return [rank for rank in others if rank not in self._heard or self._heard[rank].still >= LOOKS - 1]

    def _explain(self, place: Place, seconds: float, first: str | None) -> str:
        text = f"rank {self.rank} has waited {seconds:.1f} s in {place}, and the call did not complete."
        if first:
            return f"{text} Another rank has given up: {first}"
        if self._lost is not None:
            return f"{text} {lost_store(self._lost)} {SAME_CALLS}."
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        if silent := self._silent:
            text += f" Missing: rank(s) {silent} give no sign of life: they are dead, stopped, or cut off."
        for rank in (rank for rank in others if rank in self._heard):
            told = _last_heard(self._heard[rank].beat) if rank in silent else _stands(self._heard[rank].beat, str(place))
            text += f" Rank {rank} {told}."
        return f"{text} {SAME_CALLS}."


def _last_heard(beat: Beat) -> str:
    if not beat.place:
        return "was last heard before its first collective call"
    return f"was last heard {'in' if beat.waits else 'outside of collectives, after'} {beat.place}"


def _stands(beat: Beat, here: str) -> str:
    if not beat.place:
        return "has made no collective call yet"
    if not beat.waits:
        return f"has been outside of collectives for {beat.seconds:.1f} s, after {beat.place}: it hangs, or is late"
    return "stands there too" if beat.place == here else f"stands in {beat.place}"


def end_process(text: str) -> NoReturn:
    """The main thread sits in the driver: nothing can be raised there, and nothing can be cleaned up."""
    print(printable(f"shardembed: error: {text}"), file=sys.stderr, flush=True)
    os._exit(1)
