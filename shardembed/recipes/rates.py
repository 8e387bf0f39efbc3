"""Learning rates over the steps, computed from the step alone: nothing to save, and a resumed run has the same."""

from __future__ import annotations

import math

from shardembed.optimizer import Optimizer
from shardembed.recipes.common import ScheduleConfig


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    """What learning rates are multiplied with at `step` (from 0) of `steps`."""
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    gone = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    down = {"none": 0.0, "linear": gone, "cosine": (1 - math.cos(math.pi * gone)) / 2}[schedule.decay]
    return 1 - down * (1 - schedule.final)


class Rates:
    """Sets the rates of an optimizer, which are full-sized when this is made."""

    def __init__(self, optimizer: Optimizer, schedule: ScheduleConfig, steps: int) -> None:
        self._optimizer, self._schedule, self._steps = optimizer, schedule, steps
        self._full = [float(group["lr"]) for group in optimizer.param_groups]

    def set(self, step: int) -> None:
        scale = factor(self._schedule, step, self._steps)
        for group, full in zip(self._optimizer.param_groups, self._full, strict=True):
            group["lr"] = full * scale
