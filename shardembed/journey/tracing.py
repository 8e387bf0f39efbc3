"""What records a program to run it again meets sharded tables: torch.jit.trace is refused on all ranks, and they go on; so are CUDA
graphs, by each rank that captures one, since nothing can be told to the others meanwhile.
"""

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


def refuse_capture(device: torch.device) -> None:
    """Raises UnsupportedError where a CUDA graph is captured on this device's current stream."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            "a CUDA graph is being captured, and it cannot hold sharded tables: what a lookup sends is known on the host alone, "
            "anew for each batch, and a step that is played again would have the old learning rate and number. Capture the dense "
            "part: look up before it, copy the outputs into its static inputs, and call backward and step of the tables behind it"
        )
