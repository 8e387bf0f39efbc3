"""What is counted and timed while ranks work: every collective always, the stages of a journey only while somebody looks.

A journey says `with self.stage("lookup"):` around each of its steps. What `stage` is depends on who looks: nobody (`unwatched`,
which costs a call and nothing else), or a recorder that `observe.profile` has put there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal, get_args

Name = Literal[
    "read",
    "make route",
    "send ids",
    "wait for ids",
    "find ids",
    "max_norm",
    "lookup",
    "send back",
    "combine",
    "send grads",
    "accumulate",
    "reduce copies",
    "commit ids",
    "share row squares",
    "step",
]
STAGES: tuple[Name, ...] = get_args(Name)  # in the order in which a batch comes by
Stage = Callable[[Name], AbstractContextManager[None]]
_NOTHING: AbstractContextManager[None] = nullcontext()


def unwatched(name: Name) -> AbstractContextManager[None]:
    """Nobody looks: one and the same context for all stages."""
    return _NOTHING


@dataclass
class Tally:
    """What ran.

    Attributes:
        calls: collectives by (operation, stage).
        bytes: sent to other ranks, by the same.
        largest: bytes of the largest exchange, what was sent and what came, this rank's own share included.
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    largest: int = 0

    def operations(self) -> dict[str, int]:
        """Calls by operation."""
        total: Counter[str] = Counter()
        for (operation, _), count in self.calls.items():
            total[operation] += count
        return dict(total)

    def totals(self) -> tuple[int, int]:
        """All calls, all bytes."""
        return sum(self.calls.values()), sum(self.bytes.values())

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()
        self.largest = 0
