"""Stages that succeed on all ranks or fail on all: whatever one rank meets, every rank raises the same error."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable

from shardembed.comm.comm import Comm
from shardembed.comm.streams import handed_over, nothing
from shardembed.errors import CheckpointError, ShardEmbedError

SIGNS_OF_LIFE = 4  # in the time after which a rank that gives none counts as lost


def together(comm: Comm, stage: str, work: Callable[[], str], long: bool = False) -> list[str]:
    """Do `work` on every rank, then hear of all: the texts that it gave. Collective.

    Args:
        long: it may take longer on one rank than on others by more than the time-out of a collective. A thread does it then, and
            ranks tell each other now and then that they are still at it.

    Raises:
        CheckpointError: on every rank, where any failed; names the ranks and what each of them met.
    """
    outcome: list[str] = []

    def run(begin: Callable[[], None] = nothing) -> None:
        try:
            begin()
            outcome.append(json.dumps([work(), ""]))
        except Exception as error:  # whatever it is: the others wait to hear of it
            outcome.append(json.dumps(["", told(error)]))

    working: threading.Thread | None = None
    if long and comm.world_size > 1:
        working = threading.Thread(target=run, args=(handed_over(),), name=f"checkpoint: {stage}", daemon=True)
        working.start()
    else:
        run()
    said: list[str] = []
    while not said or not all(said):
        if working is not None:
            working.join(comm.timeout / SIGNS_OF_LIFE)
        said = comm.gather_texts("control", f"checkpoint: {stage}", outcome[0] if outcome else "")
    texts, troubles = zip(*map(json.loads, said), strict=True)
    if any(troubles):
        raise CheckpointError(merged(troubles))
    return list(texts)


def on_first(comm: Comm, stage: str, work: Callable[[], str], long: bool = False) -> str:
    """Do `work` on rank 0, and give its text to all. Collective; raises as `together`."""
    return together(comm, stage, work if comm.rank == 0 else str, long)[0]


def told(error: Exception) -> str:
    """An error in words that do without the traceback."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    return str(error) if isinstance(error, ShardEmbedError) else f"{type(error).__name__}: {error}"


def merged(troubles: Iterable[str]) -> str:
    """One message of what ranks met; where several met the same, it is said once."""
    by_text: dict[str, list[int]] = {}
    for rank, trouble in enumerate(troubles):
        if trouble:
            by_text.setdefault(trouble, []).append(rank)
    return "; ".join(f"rank {', '.join(map(str, ranks))}: {text}" for text, ranks in by_text.items())
