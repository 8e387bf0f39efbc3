"""Errors of one rank that are raised on all, where no batch is on its way."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from shardembed.comm.comm import Comm
from shardembed.errors import ShardEmbedError, rebuild, travels

Found = TypeVar("Found")


def on_all(comm: Comm, stage: str, work: Callable[[], Found]) -> Found:
    """What `work` gives on this rank. Collective.

    Raises:
        ShardEmbedError: on every rank, where one of any: a rank's own, or else the first of another's.
    """
    found: Found | None = None
    mine: ShardEmbedError | None = None
    try:
        found = work()
    except ShardEmbedError as error:
        mine = error
    told = comm.gather_texts("control", stage, json.dumps(travels(mine)) if mine is not None else "")
    if mine is not None:
        raise mine
    for text in filter(None, told):
        raise rebuild(*json.loads(text))
    return found  # type: ignore[return-value]
