"""From a GPU into host memory of one's own, through two pinned buffers: the device fills one while the host empties the other.

A copy into ordinary memory goes through buffers of the driver's, one after the other, at a fraction of the bus. All of the target
pinned would be as fast, but to pin it takes longer than the copy, and torch keeps for good what it has pinned.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BUFFERS = 2
BUFFER_BYTES = 32 << 20


@dataclass(frozen=True)
class Sent:
    """Rows on their way.

    Attributes:
        done: an event behind the copy into the buffer.
        landed: them, in the buffer.
        into: where they go.
    """

    done: Any
    landed: torch.Tensor
    into: torch.Tensor

    def arrive(self) -> None:
        self.done.synchronize()
        self.into.copy_(self.landed)


class Staging:
    """What the copies of one save share. They come behind all that the current stream has been asked for."""

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._number = 0

    def copy(self, rows: int, some: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """Rows 0 to `rows` in host memory that nobody else has, `[rows, W]`; there when this returns.

        Args:
            some: gives rows from one number up to another, `[n, W]`.
        """
        like = some(0, min(rows, 1))
        if not _on_gpu(like):
            return some(0, rows).to("cpu", copy=True)
        out = torch.empty(rows, *like.shape[1:], dtype=like.dtype)
        at_once = max(1, BUFFER_BYTES // max(1, like.nbytes))
        sent: deque[Sent] = deque()
        for first in range(0, rows, at_once):
            if len(sent) == BUFFERS:
                sent.popleft().arrive()
            part = some(first, min(first + at_once, rows))
            landed = self._next(max(BUFFER_BYTES, part.nbytes))[: part.nbytes].view(part.dtype).view(part.shape)
            sent.append(Sent(_send(part, landed), landed, out[first : first + len(part)]))
        for one in sent:
            one.arrive()
        return out

    def _next(self, size: int) -> torch.Tensor:
        """The buffer that was used the longest time ago."""
        place, self._number = self._number % BUFFERS, self._number + 1
        if len(self._buffers) <= place:
            self._buffers.append(pinned(size))
        elif len(self._buffers[place]) < size:
            self._buffers[place] = pinned(size)
        return self._buffers[place]


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def pinned(size: int) -> torch.Tensor:
    """So many bytes that a GPU reads and writes by itself."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _send(part: torch.Tensor, landed: torch.Tensor) -> Any:
    landed.copy_(part, non_blocking=True)
    return torch.cuda.current_stream(part.device).record_event()
