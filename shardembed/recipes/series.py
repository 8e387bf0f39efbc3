"""Curves of a run, from metrics.jsonl in one pass and bounded memory, however long the run was."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardembed.config import plain_json

POINTS = 400  # of a curve, at most twice as many
MOST = 1e100  # of a value that is drawn; sums and distances of such are finite
MOST_IDS = 1 << 63
THERE = ("live", "candidates")
COUNTED = (*THERE, "created", "evicted", "expired", "refused", "waiting", "unknown")
METRICS, LINE = 200, 1 << 20  # that are looked at: names of metrics, and bytes of a line
EPOCHS = 10_000  # whose beginning is kept


@dataclass
class Point:
    """Neighbouring steps.

    Attributes:
        step: the last of them.
        count: how many values there were.
        total: their sum.
        low: the smallest.
        high: the largest.
    """

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
    """A number over the steps. Beyond `2 * POINTS` points, neighbours are joined.

    Attributes:
        points: in the order of steps.
        strange: how many values were beyond `MOST`, or nan.
        lost: the last one was.
    """

    points: list[Point] = field(default_factory=list)
    strange: int = 0
    lost: bool = False
    _each: int = 1  # values of a point

    def add(self, step: int, value: float) -> None:
        self.lost = not abs(value) <= MOST  # nor inf or nan
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

    def between(self, after: int, last: int) -> float | None:
        """The mean of the values of steps beyond `after` up to `last`, as far as points are not joined across these; None: no point
        ends there.
        """
        found = [point for point in self.points if after < point.step <= last]
        return sum(point.total for point in found) / sum(point.count for point in found) if found else None


@dataclass
class Curves:
    """What metrics.jsonl tells.

    Attributes:
        steps: of the last line.
        epoch: of the last line.
        begun: the first step of each epoch but the first one that is told of.
        skipped: steps.
        stopped: why training ended, where the last line says so.
        loss: of every step.
        metrics: of evaluations during training, by name.
        ids: of each dynamic table, by what is counted: ids that are there, or to which it has happened a step.
        totals: of each dynamic table, how many ids there are in the end, or to how many it has happened.
    """

    steps: int = 0
    epoch: int = 0
    begun: list[int] = field(default_factory=list)
    skipped: int = 0
    stopped: str = ""
    loss: Series = field(default_factory=Series)
    metrics: dict[str, Series] = field(default_factory=dict)
    ids: dict[str, dict[str, Series]] = field(default_factory=dict)
    totals: dict[str, dict[str, int]] = field(default_factory=dict)

    def add_step(self, step: int, epoch: object) -> None:
        """A line on a step; epoch: as it is told there."""
        self.steps = max(self.steps, step)
        if type(epoch) is int:
            if self.epoch and epoch > self.epoch and len(self.begun) < EPOCHS:
                self.begun.append(step)
            self.epoch = epoch

    def add_ids(self, step: int, steps: int, told: dict[str, Any]) -> None:
        """What a line says of dynamic tables, `steps` after the last one; none lie between them where it tells of an evaluation."""
        for table, counts in told.items():
            if not isinstance(counts, dict) or (table not in self.ids and len(self.ids) >= METRICS):
                continue
            totals, lines = self.totals.setdefault(table, {}), self.ids.setdefault(table, {})
            for name in COUNTED:
                count = counts.get(name)
                if type(count) is int and 0 <= count < MOST_IDS:
                    there = name in THERE
                    totals[name] = count if there else totals.get(name, 0) + count
                    if steps:
                        lines.setdefault(name, Series()).add(step, count if there else count / steps)


def read(path: Path) -> Curves:
    """Of a metrics.jsonl. Lines that a crash has cut off are left out, as are those that no job writes.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no file.
    """
    found = Curves()
    for record in _records(path):
        step = record.get("step")
        if type(step) is not int or step < 0:  # the summary, which has a file of its own
            continue
        if "loss" in record:
            loss = record["loss"]  # null stands for what is not finite
            found.loss.add(step, loss if _is_number(loss) else math.nan)
            found.add_step(step, record.get("epoch"))
            found.skipped += record.get("skipped") is True
            found.stopped = str(record.get("stopped", ""))
        ids, steps = record.get("ids"), record.get("steps")
        if isinstance(ids, dict) and type(steps) is int and 0 <= steps < MOST_IDS:
            found.add_ids(step, steps, ids)
        evaluation = record.get("evaluation")
        for name, value in evaluation.items() if isinstance(evaluation, dict) else ():
            if isinstance(value, float) and (name in found.metrics or len(found.metrics) < METRICS):  # whole numbers are counts
                found.metrics.setdefault(name, Series()).add(step, value)
    return found


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with plain_json.opened(path) as file:
        while line := file.readline(LINE):
            try:
                record = plain_json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
