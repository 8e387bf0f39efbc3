"""Stages that succeed on all ranks or fail on all: whatever one rank meets, every rank raises the same error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import torch

from shardembed.comm import Comm
from shardembed.errors import CheckpointError, CollectiveError, ShardEmbedError

CPU = torch.device("cpu")


def together(comm: Comm, stage: str, work: Callable[[], str]) -> list[str]:
    """Do `work` on every rank, then hear of all: the texts that it gave. Collective.

    Raises:
        CheckpointError: on every rank, where any failed; names the ranks and what each of them met.
    """
    text, trouble = "", ""
    try:
        text = work()
    except CollectiveError:  # the ranks can no longer talk
        raise
    except Exception as error:  # whatever it is: the others wait to hear of it
        text, trouble = "", told(error)
    said = [json.loads(one) for one in comm.gather_texts("control", f"checkpoint: {stage}", json.dumps([text, trouble]), CPU)]
    troubles = [trouble for _, trouble in said]
    if any(troubles):
        raise CheckpointError(merged(troubles))
    return [text for text, _ in said]


def on_first(comm: Comm, stage: str, work: Callable[[], str]) -> str:
    """Do `work` on rank 0, and give its text to all. Collective; raises as `together`."""
    return together(comm, stage, work if comm.rank == 0 else str)[0]


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
