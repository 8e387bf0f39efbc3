"""torch.jit.trace meets sharded tables: refused on all ranks, and they go on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from shardembed.errors import UnsupportedError


@contextmanager
def paused() -> Iterator[None]:
    """Have nothing traced: a process group cannot be, so a traced rank could not even tell the others what is wrong."""
    tracing = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch._C._set_tracing_state(tracing)  # pyright: ignore[reportAttributeAccessIssue]


def refuse() -> NoReturn:
    raise UnsupportedError(
        "torch.jit.trace cannot follow ids to other ranks, and would keep the rows of this batch as constants: trace a plain "
        "model, from se.unshard() or se.load_plain()"
    )
