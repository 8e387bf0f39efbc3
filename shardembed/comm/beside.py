"""Work beside the main thread, one piece after the other: in a thread, and for a GPU on a stream of its own there.

A line goes on until a piece fails; what comes behind that is dropped, on all ranks alike, since a piece fails on all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from shardembed.comm.streams import Event, Side

Work = Callable[[], Any]
Finish = Callable[[Any], None]


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


@dataclass(frozen=True)
class Piece:
    """A piece of work on its way to the thread.

    Attributes:
        work: what to do.
        given: what it is done on.
        ready: when that is there.
    """

    work: Work
    given: Any
    ready: Event


class Line:
    """Pieces of work in order, in a thread of their own, and their outcomes in the same order. The thread keeps nothing alive but
    what it works at.
    """

    def __init__(self, side: Side) -> None:
        self._side = side
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[Outcome, Event]] = SimpleQueue()
        args = (self._pieces, self._outcomes, side)
        self._thread = threading.Thread(target=_serve, args=args, daemon=True, name="shardembed-prefetch")
        self._thread.start()

    def submit(self, work: Work, given: Any) -> None:
        """Do `work` on `given`."""
        self._pieces.put(Piece(work, given, self._side.lend(given)))

    def take(self, finish: Finish) -> Outcome:
        """The next outcome, when it is there. Not to be asked for again after one that failed.

        Args:
            finish: what is done with the value first, in this thread and on the line's stream: collectives that keep the order of
                the program. Not after a failure.
        """
        outcome, done = self._outcomes.get()
        if outcome.error is None:
            with self._side.working(done):
                finish(outcome.value)
                done = self._side.mark()
        self._side.fetch(outcome.value, done)
        return outcome

    def close(self) -> None:
        """Return when all that was submitted is done."""
        self._pieces.put(None)
        if threading.current_thread() is not self._thread:  # else garbage is collected there
            self._thread.join()


def _serve(pieces: SimpleQueue[Piece | None], outcomes: SimpleQueue[tuple[Outcome, Event]], side: Side) -> None:
    side.begin()
    failed = False
    while (piece := pieces.get()) is not None:
        if not failed:
            with side.working(piece.ready):
                outcome = _done(piece.work)
                failed = outcome.error is not None
                outcomes.put((outcome, side.mark()))
            del outcome  # or a batch would live until the next one
        del piece
