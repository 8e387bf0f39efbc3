"""Losses, gradients and tables that are not finite: what a job says of them, and when it ends for them.

`train.on_nonfinite` is `se.Optimizer`'s: it looks at every step's gradients on all ranks, before anything changes. What is left are
updates that overflow, which nobody sees before the row is read again: each save looks, and `check` does at the end.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from shardembed.checkpoint.retention import said
from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.errors import NonFiniteError, NonFiniteGradientError
from shardembed.kernels.reference import is_finite
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.report import ProgressReport

MOST_IN_A_ROW = 100  # steps that are skipped, after which no more is to be hoped for
MOST_TOLD = 5


class Skipped:
    """Counts the steps of a job that were skipped."""

    def __init__(self, job: TrainingJob, shown: ProgressReport) -> None:
        self._optimizer, self._shown = job.optimizer, shown
        self._told, self._in_a_row = 0, 0
        self._count = self._optimizer.skipped

    def last_was(self, step: int) -> bool:
        """Step number `step` (from 1), the last one taken, was skipped.

        Raises:
            NonFiniteError: on all ranks: so were very many before it.
        """
        skipped, self._count = self._optimizer.skipped > self._count, self._optimizer.skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if skipped and self._told < MOST_TOLD:
            self._told += 1
            more = " (more of them are counted, not told)" if self._told == MOST_TOLD else ""
            seen = "; ".join(self._optimizer.skipped_for)
            self._shown.note(f"step {step}: the loss or a gradient is inf or nan, seen by {seen}: the step was skipped{more}")
        if self._in_a_row == MOST_IN_A_ROW:
            raise NonFiniteError(
                f"the last {MOST_IN_A_ROW} steps were all skipped, so skipping does not help; the last one for inf or nan, "
                f"seen by {'; '.join(self._optimizer.skipped_for)}"
            )
        return skipped


def check(job: TrainingJob) -> None:
    """Collective.

    Raises:
        NonFiniteError: on all ranks: a table or a dense parameter of any holds inf or nan.
    """
    lost = dict.fromkeys(sorted(table.name for table in job.model.tables.tables), False)
    for slab in job.model.tables.journey.slabs:
        for shard in slab.shards():
            lost[shard.table] |= not is_finite(shard.weights)  # host sync on a GPU
        if slab.dynamic is not None:
            living = slab.weights[slab.dynamic.census.living(slab.dynamic.steps)]
            lost[slab.table_of(slab.spec.lanes[0])] |= not is_finite(living)
    names = [*lost, "the dense parameters"]
    flags = [*lost.values(), not all(map(is_finite, job.model.parameters()))]
    device = default_device()
    found = torch.tensor(flags, dtype=torch.float32, device=device)
    seen = Comm.of().all_reduce("agree that tables are finite", found, maximum=True).tolist()
    where = [name for name, flag in zip(names, seen, strict=True) if flag]
    if where:
        error = NonFiniteError(f"inf or nan is in {', '.join(where)}")
        error.places = tuple(where)
        raise error


def line(step: int, epoch: int, skipped: bool, loss: float) -> dict[str, Any]:
    """A step's line of metrics.jsonl, in which a loss that is not finite is null: JSON has no word for it."""
    return {"step": step, "epoch": epoch, "loss": loss if math.isfinite(loss) else None, **({"skipped": True} if skipped else {})}


def why(error: NonFiniteError, taken: int, steps: int) -> str:
    """Why training ends after `taken` steps, in words."""
    if isinstance(error, NonFiniteGradientError):
        return (
            f"step {taken + 1} of {steps}: the loss or a gradient is inf or nan, seen by {'; '.join(error.places)}. Training "
            "stopped before this step changed anything"
        )
    if error.places:
        return f"step {taken} of {steps}: an update put inf or nan into {said(error.places)}. Training stopped and saved none of it"
    return f"step {taken + 1} of {steps}: {error}. Training stopped"


def advice(error: NonFiniteError) -> str:
    if isinstance(error, NonFiniteGradientError):
        return (
            "lower the learning rates, or look at the data of this step and at the update before it; train.on_nonfinite=skip "
            "leaves such steps out, which helps where the data are to blame (docs/runs.md, Inf and nan)"
        )
    return "lower the learning rates"


def last_line(error: NonFiniteError, taken: int, epoch: int, why: str) -> dict[str, Any]:
    """The last line of metrics.jsonl, until the run goes on from before."""
    step = taken + 1 if isinstance(error, NonFiniteGradientError) else taken
    return {"step": step, "epoch": epoch, "loss": None, "stopped": why}
