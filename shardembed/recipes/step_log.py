"""Lines of metrics.jsonl for the steps of a training: losses stay on their device until several are read at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from shardembed.comm.comm import Comm
from shardembed.errors import NonFiniteError
from shardembed.recipes import nonfinite
from shardembed.recipes.runs import Run
from shardembed.recipes.saving import Progress


class StepLog:
    """Steps whose losses have not been gathered from the ranks yet."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._losses: list[torch.Tensor] = []
        self._lines: list[tuple[int, int, bool]] = []

    def add(self, step: int, epoch: int, loss: torch.Tensor, skipped: bool) -> None:
        """Of step number `step` (from 1) this rank's loss, a number on its device, which nothing here waits for."""
        self._losses.append(loss)
        self._lines.append((step, epoch, skipped))

    def gathered(self) -> list[dict[str, Any]]:
        """The lines since the last call, with the means over the ranks of the losses, in one all-reduce. Collective."""
        if not self._lines:
            return []
        comm = Comm.of()
        total = comm.all_reduce("mean losses", torch.stack(self._losses).to(torch.float64))
        means = (total / comm.world_size).tolist()
        lines = [nonfinite.line(*line, loss) for line, loss in zip(self._lines, means, strict=True)]
        self._lines, self._losses = [], []
        return lines

    @contextmanager
    def stopping(self, progress: Callable[[], Progress], steps: int) -> Iterator[None]:
        """Around the loop: one that ends for inf or nan leaves the reason as its last line. Collective then."""
        try:
            yield
        except NonFiniteError as error:
            last = progress()
            why = nonfinite.why(error, last.step, steps)
            lines = self.gathered()
            if self._run.folder is not None:
                self._run.folder.log([*lines, nonfinite.last_line(error, last.step, last.epoch, why)], lasting=True)
            raise NonFiniteError(f"{why}; {nonfinite.advice(error)}") from error
