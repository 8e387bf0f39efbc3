"""Work that takes some ranks far longer than others, as the drawing of large tables does at the start: all wait for all, patiently.

A time limit would end jobs whose ranks are only slow. Whoever dies meanwhile closes connections, which ends the wait as ever;
whoever hangs gives no more beats, or goes on giving some and is waited for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from shardembed.errors import CollectiveError

if TYPE_CHECKING:
    from shardembed.comm.comm import Comm
    from shardembed.comm.heartbeat import Heartbeat


@contextmanager
def together(comm: Comm, stage: str, beating: Heartbeat | None) -> Iterator[None]:
    """`Comm.patiently`, with more than one rank. beating: of this call alone; it is stopped in the end."""
    problem: Exception | None = None
    told: Sequence[str] = ()
    try:
        yield
    except Exception as error:
        problem = error
    text = f"{type(problem).__name__}: {problem}" if problem is not None else ""
    try:
        if comm.tell("control", stage, np.full((comm.world_size, 1), int(bool(text))), patient=True).any():
            told = comm.gather_texts("control", stage, text)
    except CollectiveError as error:
        problem = problem or error
    if beating is not None:
        beating.stop()
    if problem is not None:
        raise problem
    if any(told):
        raise CollectiveError(f"rank {comm.rank} stops in {stage!r}, where others have failed: {listed(told)}")


def listed(told: Sequence[str]) -> str:
    """What ranks have to say, of those that say something."""
    return "; ".join(f"rank {rank}, {text}" for rank, text in enumerate(told) if text)
