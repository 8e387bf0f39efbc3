"""When a collective did not complete: what the ranks tell each other through the job's store, and the error that follows.

The store itself may be lost with the rank that hosts it. One that has ended refuses connections; one that is stopped (SIGSTOP, a
frozen machine) does not answer at all, and no operation of torch's client has a time limit then, not even those that take one. So
whatever talks to the store here runs in a thread of its own, with a connection of its own, and is given up after a while.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from shardembed.errors import SAME_CALLS, SAME_OUTPUTS

REPORT_SECONDS = 3.0  # how long ranks in trouble wait for each other's reports
STORE_SECONDS = 2.0  # how long the store may take to answer, on top of that

T = TypeVar("T")
Lost = Literal["gone", "silent"]  # the store's host has ended; it does not answer


class UnansweredError(RuntimeError):
    """A call took longer than it may; its thread is left behind."""

    def __init__(self, seconds: float, thread: threading.Thread) -> None:
        super().__init__(f"no answer within {seconds:g} s")
        self.thread = thread


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` answers, in another thread.

    Raises:
        UnansweredError: it takes longer than that. RuntimeError: whatever it raises.
    """
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="shardembed-store")
    thread.start()
    thread.join(seconds)
    if answers:
        return answers[0]
    if errors:
        raise errors[0]
    raise UnansweredError(seconds, thread)


def own_store(prefix: str) -> dist.Store:
    """The job's store below a prefix, over a connection of its own: one that blocks holds up everybody else on it."""
    store: Any = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"shardembed/{prefix}", store.clone())


def lost_store(how: Lost) -> str:
    """Who is to blame for a store that is lost."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = "the launcher, which hosts it," if agent else "rank 0, which hosts it unless a launcher does,"
    if how == "gone":
        return f"The store where ranks meet is gone: {host} has ended."
    return f"The store where ranks meet does not answer: {host} is stopped or hangs."


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        operation: the kind of collective.
        stage: what it is for.
        about: the forward call or the collection that it belongs to, in words; empty where there is none.
        forwards: forward calls so far; None where there can be none.
        step: optimizer steps so far.
    """

    operation: str
    stage: str
    about: str
    forwards: int | None
    step: int

    def __str__(self) -> str:
        about = f", {self.about}" if self.about else ""
        call = f"forward call {self.forwards}, " if self.forwards is not None else ""
        return f"stage {self.stage!r} ({self.operation}{about}), {call}optimizer step {self.step}"


@dataclass(frozen=True)
class Reports:
    """What could be heard of the other ranks.

    Attributes:
        said: where they say that they stand, by rank.
        missing: ranks that do not say it.
        lost: what has become of the store, where nobody could say anything.
    """

    said: dict[int, str]
    missing: list[int]
    lost: Lost | None = None


def gather_reports(name: str, rank: int, world_size: int, here: str) -> Reports:
    """Tell the other ranks of the group `name` where this one stands, and hear where they do. Never hangs."""
    others = [other for other in range(world_size) if other != rank]

    def ask() -> Reports:
        store = own_store(f"trouble/{name}")

        def wait_for(keys: list[str]) -> None:
            until = time.monotonic() + REPORT_SECONDS
            while time.monotonic() < until and not store.check(keys):
                time.sleep(0.05)

        store.set(str(rank), json.dumps(here))
        wait_for([str(other) for other in others])
        said = {other: json.loads(store.get(str(other))) for other in others if store.check([str(other)])}
        store.set(f"{rank} has heard", "")
        if rank == 0:  # it may host the store: were it to end now, the others would take that for the cause
            wait_for([f"{other} has heard" for other in said])
        return Reports(said, [other for other in others if other not in said])

    try:
        return within(2 * REPORT_SECONDS + STORE_SECONDS, ask)
    except UnansweredError:
        return Reports({}, [], "silent")
    except RuntimeError:
        return Reports({}, [], "gone")


def explain(rank: int, here: str, waited: float, error: RuntimeError, reports: Reports) -> str:
    """The text of a CollectiveError: where this rank stood, and what the others say."""
    text = f"rank {rank} waited {waited:.1f} s in {here}, and the call did not complete."
    if reports.lost:
        text += f" {lost_store(reports.lost)}"
    elif reports.missing:
        text += f" Missing: rank(s) {reports.missing} did not take part: they crashed, hang, or have left the loop."
    for other, place in reports.said.items():
        text += f" Rank {other} stood in {place}." if place != here else f" Rank {other} stood there too."
    cause = re.sub(r"^\[\S*\] ", "", str(error).splitlines()[0])  # without the place in torch's own sources
    if any(place != here and "'backward: " in place and "'backward: " in here for place in reports.said.values()):
        text += f" {SAME_OUTPUTS}."
    return f"{text} {SAME_CALLS}. Cause: {cause}"


def explain_mismatch(rank: int, here: str, reports: Reports) -> str:
    """The text of a DisagreementError: this rank made another call than the others, who say which."""
    places = {rank: here, **reports.said}
    if len(set(places.values())) == 1:
        return f"all ranks came to {here}, but not by the same calls. {SAME_CALLS}"
    said = [f"rank {rank} is in {place}" for rank, place in sorted(places.items())]
    return f"ranks are not making the same call: {'; '.join(said)}. {SAME_CALLS}"


def explain_lines(what: str, texts: Sequence[Sequence[str]]) -> str:
    """The text of a DisagreementError where ranks hold different lines: the first that differs; empty where none does."""
    for held in zip_longest(*texts, fillvalue="(nothing)"):
        if len(set(held)) > 1:
            other = next(rank for rank, line in enumerate(held) if line != held[0])
            return (
                f"ranks disagree on {what}: rank 0 has {held[0]}; rank {other} has {held[other]}. "
                "Build the same collection, with the same plan and optimizer, on every rank"
            )
    return ""


def of_torch(error: RuntimeError) -> bool:
    """A collective of torch's failed, for example one of DistributedDataParallel's."""
    return isinstance(error, dist.DistError) or "gloo/" in str(error)
