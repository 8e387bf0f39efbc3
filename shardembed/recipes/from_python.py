"""`se.train`: the training job as a function, for programs, notebooks, and sweeps, which are loops over it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shardembed.checkpoint import chance
from shardembed.config import plain_json
from shardembed.config.console import CleanConsole
from shardembed.errors import DataError
from shardembed.modules.collection import EmbeddingCollection
from shardembed.recipes import config as settings_of
from shardembed.recipes import tracking
from shardembed.recipes import train as job
from shardembed.recipes.common import JobConfig
from shardembed.recipes.run_folder import METRICS, PAGE

if TYPE_CHECKING:
    from shardembed.recipes.use.run import OpenedRun


@dataclass(frozen=True)
class TrainedRun:
    """What `train` has made.

    Attributes:
        summary: all that `summary.json` has.
        metrics: of the evaluation at the end, by name.
        folder: of the run; rank 0 has written it.
        config: the settings, with all defaults.
        model: as it is at the end, on this rank.
    """

    summary: dict[str, Any] = field(repr=False)
    metrics: dict[str, Any]
    folder: Path
    config: JobConfig = field(repr=False)
    model: torch.nn.Module = field(repr=False)

    @property
    def tables(self) -> EmbeddingCollection:
        """Of the model; their `rows`, `topk` and `ids` are collective."""
        tables: EmbeddingCollection = self.model.tables  # type: ignore[assignment]
        return tables

    def open(self) -> OpenedRun:
        """As `se.open_run(folder)`: to recommend, to score, for vectors. Collective."""
        from shardembed.recipes.use.run import open_run  # which needs pyarrow, as training need not

        return open_run(self.folder)

    @property
    def page(self) -> Path | None:
        """The page `run.html`; None where there is none."""
        path = self.folder / PAGE
        return path if path.is_file() else None

    @property
    def losses(self) -> list[dict[str, Any]]:
        """A dict a step: `step`, `epoch`, `loss` (None: inf or nan), as pandas takes them. Read from `metrics.jsonl`.

        Raises:
            DataError: it cannot be read.
        """
        return [{name: line[name] for name in ("step", "epoch", "loss")} for line in self._lines() if "loss" in line]

    @property
    def history(self) -> list[dict[str, Any]]:
        """A dict an evaluation: `step` and the metrics, those during training and then the one at the end, if its weights had not
        been evaluated; raises as `losses`.
        """
        found = [{"step": line["step"], **line["evaluation"]} for line in self._lines() if "evaluation" in line]
        step = self.summary["best_step"]
        return found if any(line["step"] == step for line in found) else [*found, {"step": step, **self.metrics}]

    def _lines(self) -> Iterator[dict[str, Any]]:
        path = self.folder / METRICS
        try:
            with plain_json.opened(path) as file:
                yield from (plain_json.loads(line) for line in file)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def train(
    config: str | Path | Mapping[str, Any] | JobConfig,
    *,
    settings: Mapping[str, Any] | None = None,
    fresh: bool = False,
    from_run: str | Path | TrainedRun | None = None,
    quiet: bool = False,
) -> TrainedRun:
    """Train and evaluate a model, as `shardembed train` does: on one rank in this process, or as a rank where torchrun has started
    it or there is a process group, which stays. Collective then. It may be called again and again; the states of the random
    generators that training sets are afterwards what they were.

    An unfinished run of the same name and settings in `run_dir` is gone on with, unless `fresh`.

    Args:
        config: a YAML file, the name of one that comes along, or the same as nested dicts and lists.
        settings: to be put in place of what `config` says, by dotted names: `{"train.epochs": 3}`.
        fresh: begin a new run whatever there is.
        from_run: a finished run, its folder, "last" for the last one of this name, or the folder of a checkpoint: whose model this
            one begins with.
        quiet: print nothing. Else rank 0 prints what the command does.

    Raises:
        ConfigError: settings are wrong; says all of them, with file and line, or the path in the dict.
        DataError, PlanError, NonFiniteError, CheckpointError: as the command ends with, on all ranks.
    """
    if isinstance(config, str) and not os.path.isfile(config):
        from shardembed.planner import builtin  # takes a second to import

        config = builtin.locate("train", config)
    wanted = settings_of.given(config, settings)
    tracking.check(wanted.log)
    former = from_run.folder if isinstance(from_run, TrainedRun) else from_run
    with _kept_chance():
        done = job.work(wanted, CleanConsole(quiet=quiet), fresh, former)
    return TrainedRun(done.summary, done.metrics, done.path, wanted, done.job.model)


@contextmanager
def _kept_chance() -> Iterator[None]:
    """A job seeds its model, and so would the caller's draws after it all be the same."""
    states = chance.capture()
    try:
        yield
    finally:
        chance.restore(states)
