"""A run as its folder tells it, finished or not, in whatever state: what cannot be read is not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from shardembed.checkpoint.folders import newest_checkpoint
from shardembed.config import plain_json
from shardembed.config.located import MAX_BYTES
from shardembed.embeddings.of_run import CHECKPOINTS
from shardembed.errors import ShardEmbedError
from shardembed.recipes import observed, series
from shardembed.recipes.run_folder import CONFIG, METRICS, OBSERVED, PLAN, SUMMARY
from shardembed.tables.plan import FILE_BYTES, VALUES, Plan

Found = TypeVar("Found")


@dataclass(frozen=True)
class Recorded:
    """A run, as far as its folder tells.

    Attributes:
        path: of the folder.
        config: the settings as text.
        plan: where the tables lie; None where it cannot be read.
        curves: of the metrics.
        summary: of a run that has ended, else None.
        starts: of `watch`, one a start.
        look: the latest of `watch`, if there is one.
        checkpoint: the name of the newest complete one.
        unread: files that are there and cannot be used, each with the reason.
    """

    path: Path
    config: str
    plan: Plan | None
    curves: series.Curves
    summary: dict[str, Any] | None
    starts: list[dict[str, Any]]
    look: dict[str, Any] | None
    checkpoint: str | None
    unread: tuple[str, ...] = ()

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

    @property
    def kept(self) -> int | None:
        """The step whose weights the run has ended with and evaluated, where these are not its last."""
        step = (self.summary or {}).get("best_step") or None
        return step if self.summary is not None and step != self.summary["steps"] else None

    @property
    def history(self) -> dict[str, list[series.Point]]:
        """The evaluations of each metric in the order of steps, the one at the end among them, which may be of earlier weights."""
        found = {name: list(one.points) for name, one in self.curves.metrics.items() if one.points}
        if self.summary is not None:
            step = self.kept or self.summary["steps"]
            for name, value in self.results.items():
                points = found.setdefault(name, [])
                if abs(value) <= series.MOST and all(point.step != step for point in points):
                    points.append(series.Point(step, 1, value, value, value))
                    points.sort(key=lambda point: point.step)
        return {name: points for name, points in found.items() if points}


RATES = ("samples_per_second",)


def read(path: Path) -> Recorded:
    """What is in the folder of a run."""
    unread: list[str] = []

    def found(name: str, read: Callable[[Path], Found]) -> Found | None:
        try:
            return read(path / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            unread.append(f"{name}: {error.strerror or error}")
        except (ValueError, ShardEmbedError) as error:
            unread.append(f"{name}: {error!s:.300}")
        return None

    watched = found(OBSERVED, observed.observed) or {"starts": [], "look": None}
    newest = found(CHECKPOINTS, newest_checkpoint)
    return Recorded(
        path,
        found(CONFIG, lambda file: plain_json.read_bytes(file, most=MAX_BYTES).decode()) or "",
        found(PLAN, lambda file: Plan.from_json(plain_json.read(file, most=FILE_BYTES, values=VALUES))),
        found(METRICS, series.read) or series.Curves(),
        found(SUMMARY, observed.summary),
        watched["starts"],
        watched["look"],
        newest.name if newest is not None else None,
        tuple(unread),
    )
