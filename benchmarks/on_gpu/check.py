"""What a check is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Status = Literal["passes", "FAILS", "measured", "not seen"]


class NotSeenError(Exception):
    """What a check is about cannot be seen on this machine; the text says why."""


@dataclass(frozen=True)
class Here:
    """Where a check runs.

    Attributes:
        device: the first GPU; without one the CPU, and Triton's kernels in its interpreter.
        gpus: how many there are.
    """

    device: torch.device
    gpus: int

    @property
    def small(self) -> bool:
        """Sizes are to be tried in an interpreter."""
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Check:
    """Something to be seen.

    Attributes:
        title: what it is, in the page.
        run: yields lines about what it has seen; an error is a failure, but `NotSeenError`.
        seconds: that it may take.
        hidden: what of it cannot be seen without a GPU.
        needs_gpu: that is all of it.
        measures: it gives figures, and no verdict.
    """

    title: str
    run: Callable[[Here], Iterator[str]]
    seconds: float
    hidden: str
    needs_gpu: bool = False
    measures: bool = False


@dataclass(frozen=True)
class Verdict:
    """What came of a check.

    Attributes:
        name: of the check.
        status: what it is.
        lines: what was seen, or why nothing was.
        seconds: that it took.
    """

    name: str
    status: Status
    lines: tuple[str, ...]
    seconds: float
