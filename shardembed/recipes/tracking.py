"""Where a run is told of beside its folder: TensorBoard and MLflow. Each gets the settings, what steps and evaluations find, and
the metrics at the end. One that fails says so and is told no more; the training goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol

from shardembed.optimizer import Optimizer
from shardembed.recipes.common import JobConfig, LogConfig
from shardembed.recipes.runs import Run

Note = Callable[[str], None]
Point = tuple[int, str, float]  # a step, what is measured, and its value


class Tracker(Protocol):
    """What is told of a run; a context, which lets go of it."""

    def __enter__(self) -> object: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def add(self, points: Sequence[Point]) -> None:
        """What has become known."""
        ...

    def finish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Of the evaluation at the end."""
        ...


def check(config: LogConfig) -> None:
    """Before a job starts.

    Raises:
        UnsupportedError: a tracker is asked for and not installed, or cannot be imported.
    """
    if config.tensorboard:
        from shardembed.recipes import scalars

        scalars.check()
    if config.mlflow is not None:
        from shardembed.recipes import mlflow_log

        mlflow_log.check()


class Tracking:
    """All trackers of one start of a run, none where this rank has no folder. Use it as a context.

    Args:
        begun: steps that were taken before.
        note: tells the user something.
    """

    def __init__(self, run: Run, config: JobConfig, begun: int, note: Note) -> None:
        self._trackers: list[Tracker] = []
        self._around = ExitStack()
        if run.folder is None:
            return
        settings = flat(config)
        if config.log.tensorboard:
            from shardembed.recipes.scalars import Scalars

            self._trackers.append(Scalars(run.path, begun, note, settings))
        if config.log.mlflow is not None:
            from shardembed.recipes.mlflow_log import MlflowLog

            self._trackers.append(MlflowLog(run.path, config.log.mlflow, begun, note, settings))

    def __enter__(self) -> Tracking:
        for tracker in self._trackers:
            self._around.enter_context(tracker)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._around.__exit__(kind, error, trace)

    def add(self, lines: Iterable[Mapping[str, Any]], optimizer: Optimizer, samples_per_second: float) -> None:
        if not self._trackers:
            return
        lines, groups = list(lines), optimizer.param_groups
        rates = {"train/samples a second": samples_per_second, "learning rate/tables": float(groups[-1]["lr"])}
        if optimizer.dense is not None:
            rates["learning rate/dense"] = float(groups[0]["lr"])
        points = [*_points(lines), *((lines[-1]["step"], name, value) for name, value in rates.items())]
        for tracker in self._trackers:
            tracker.add(points)

    def finish(self, step: int, metrics: Mapping[str, Any]) -> None:
        found = {name: float(value) for name, value in metrics.items() if _is_number(value)}
        for tracker in self._trackers:
            tracker.finish(step, found)


def flat(config: JobConfig) -> dict[str, str | int | float | bool]:
    """The settings by their dotted names: those that are null are left out, and lists are JSON."""
    return dict(_leaves(config.model_dump(mode="json", exclude_none=True), ""))


def _points(lines: Iterable[Mapping[str, Any]]) -> Iterator[Point]:
    """What lines of metrics.jsonl tell of losses and evaluations."""
    for line in lines:
        step = line["step"]
        if line.get("loss") is not None:
            yield step, "train/loss", line["loss"]
        for name, value in line.get("evaluation", {}).items():
            if isinstance(value, float):
                yield step, f"eval/{name}", value


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name}".lstrip("."))
    else:
        yield path, json.dumps(value) if isinstance(value, list) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
