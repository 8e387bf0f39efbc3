"""Curves of a run, from metrics.jsonl in one pass and bounded memory, however long the run was."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardembed.recipes.run_folder import METRICS

POINTS = 400  # of a curve, at most twice as many


@dataclass
class Point:
    """Neighbouring steps: the last of them, and how many values there were, their sum, the smallest and the largest."""

    step: int
    count: int
    total: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        return self.total / self.count

    def join(self, other: Point) -> Point:
        return Point(
            max(self.step, other.step),
            self.count + other.count,
            self.total + other.total,
            min(self.low, other.low),
            max(self.high, other.high),
        )


@dataclass
class Series:
    """A number over the steps. Beyond `2 * POINTS` points, neighbours are joined. strange: values that are not finite, and lost is
    true where the last one is not.
    """

    points: list[Point] = field(default_factory=list)
    strange: int = 0
    lost: bool = False
    _each: int = 1  # values of a point

    def add(self, step: int, value: float) -> None:
        self.lost = not math.isfinite(value)
        if self.lost:
            self.strange += 1
            return
        point = Point(step, 1, value, value, value)
        if self.points and self.points[-1].count < self._each:
            self.points[-1] = self.points[-1].join(point)
        else:
            self.points.append(point)
        if len(self.points) >= 2 * POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points, self._each = [one.join(other) for one, other in pairs], 2 * self._each

    def tail(self, count: int) -> Point:
        """The last points joined, so that they stand for `count` values or more; there must be one."""
        found, *before = self.points[::-1]
        for point in before:
            if found.count >= count:
                break
            found = point.join(found)
        return found


@dataclass
class Curves:
    """steps, epoch: of the last line. skipped: steps. stopped: why training ended, where the last line says so. loss: of every
    step. metrics: of evaluations during training, by name.
    """

    steps: int = 0
    epoch: int = 0
    skipped: int = 0
    stopped: str = ""
    loss: Series = field(default_factory=Series)
    metrics: dict[str, Series] = field(default_factory=dict)


def read(folder: Path) -> Curves:
    """Of a run's folder; empty where nothing has been written. Lines that a crash has cut off are left out."""
    found = Curves()
    for record in _records(folder / METRICS):
        step = record.get("step")
        if not isinstance(step, int):  # the summary, which has a file of its own
            continue
        if "loss" in record:
            loss = record["loss"]  # null stands for what is not finite
            found.loss.add(step, loss if _is_number(loss) else math.nan)
            found.steps, found.epoch = max(found.steps, step), record.get("epoch", found.epoch)
            found.skipped += record.get("skipped") is True
            found.stopped = str(record.get("stopped", ""))
        evaluation = record.get("evaluation")
        for name, value in evaluation.items() if isinstance(evaluation, dict) else ():
            if isinstance(value, float):  # whole numbers are counts
                found.metrics.setdefault(name, Series()).add(step, value)
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if isinstance(record, dict):
                    yield record
    except OSError:
        return


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
