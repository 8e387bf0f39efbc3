"""A run as its folder tells it, finished or not, in whatever state: what cannot be read is not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shardembed.checkpoint.folders import newest_checkpoint
from shardembed.errors import ShardEmbedError
from shardembed.plan import Plan
from shardembed.recipes import series, watch
from shardembed.recipes.run_folder import CHECKPOINTS, CONFIG, PLAN, SUMMARY

Found = TypeVar("Found")


@dataclass(frozen=True)
class Recorded:
    """config: the settings as text. starts, look: of `watch`. checkpoint: the name of the newest complete one."""

    path: Path
    config: str
    plan: Plan | None
    curves: series.Curves
    summary: dict[str, Any] | None
    starts: list[dict[str, Any]]
    look: dict[str, Any] | None
    checkpoint: str | None

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def start(self) -> dict[str, Any]:
        """The last one."""
        return self.starts[-1] if self.starts else {}

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        steps = self.start.get("steps")
        of = f" of {steps:,}" if steps else ""
        if self.summary is not None:
            early = " (ended early: evaluations grew no better)" if self.summary.get("stopped_early") else ""
            skipped = self.curves.skipped
            left_out = f", of which {skipped:,} were skipped for a loss or a gradient that was inf or nan" if skipped else ""
            return f"finished after {self.summary.get('steps', 0):,} steps{left_out}{early}"
        stopped = f" (stopped: {self.curves.stopped})" if self.curves.stopped else ""
        at = f"unfinished, at step {self.curves.steps:,}{of}{stopped}"
        return f"{at}; its newest checkpoint is {self.checkpoint}" if self.checkpoint else f"{at}, without a checkpoint"

    @property
    def results(self) -> dict[str, float]:
        """The metrics of the evaluation at the end, or else of the last one before."""
        if self.summary is not None:
            return {name: value for name, value in self.summary.items() if isinstance(value, float) and name not in RATES}
        return {name: found.points[-1].mean for name, found in self.curves.metrics.items() if found.points}


RATES = ("samples_per_second",)


def read(path: Path) -> Recorded:
    """What is in the folder of a run."""
    observed = watch.read(path)
    newest = _or_none(lambda: newest_checkpoint(path / CHECKPOINTS))
    return Recorded(
        path,
        _or_none(lambda: (path / CONFIG).read_text(encoding="utf-8")) or "",
        _or_none(lambda: Plan.load(path / PLAN)),
        series.read(path),
        _or_none(lambda: json.loads((path / SUMMARY).read_text(encoding="utf-8"))),
        observed["starts"],
        observed["look"],
        newest.name if newest is not None else None,
    )


def _or_none(read: Callable[[], Found]) -> Found | None:
    try:
        return read()
    except (OSError, ValueError, ShardEmbedError):
        return None
