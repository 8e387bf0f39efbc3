"""Checkpoints of a run: what is saved beside the model, saving without ending the job, and resuming."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

import shardembed as se
from shardembed.embeddings import compared
from shardembed.errors import CheckpointError
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.common import EvaluationConfig
from shardembed.recipes.runs import Run

LOSSES_KEPT = 20  # of the first steps, for the summary


@dataclass(frozen=True)
class Progress:
    """How far a run is, restarts included.

    Attributes:
        step: steps trained.
        epoch: the one it is in, from 1.
        samples: trained on.
        seconds: that it took.
        losses: the first ones; None where one was inf or nan.
        best: score of an evaluation so far; None before the first.
        waited: how many evaluations since were no better.
        stopped: training ended early for that.
        kept: score of the best weights, which are kept; None where there are none.
        kept_step: the step that they are of.
        kept_by: what scores are measured by.
    """

    step: int = 0
    epoch: int = 1
    samples: int = 0
    seconds: float = 0.0
    losses: tuple[float | None, ...] = ()
    best: float | None = None
    waited: int = 0
    stopped: bool = False
    kept: float | None = None
    kept_step: int = 0
    kept_by: str = ""

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(self.seconds, 1e-9)

    def with_losses(self, losses: list[float | None]) -> Progress:
        return replace(self, losses=(*self.losses, *losses)[:LOSSES_KEPT])

    def with_score(self, score: float, config: EvaluationConfig) -> Progress:
        """After another evaluation during training."""
        if is_higher(score, self.best, config.min_gain):
            return replace(self, best=score, waited=0)
        waited = self.waited + 1
        return replace(self, waited=waited, stopped=config.patience is not None and waited >= config.patience)


def is_higher(score: float, than: float | None, by: float = 0.0) -> bool:
    """Whether a score is better than the best before (None: there was none) by more than `by`: larger is, and any than nan."""
    return than is None or (math.isnan(than) and not math.isnan(score)) or score > than + by


def save(console: Console, run: Run, job: TrainingJob, progress: Progress, keep: int) -> Path | None:
    """Save a checkpoint of the run; returns its folder. Collective. One that fails on all ranks, as on a full disk, is reported and
    ends nothing: then None.

    Raises:
        NonFiniteError: on all ranks: a table or a parameter holds inf or nan, so nothing was saved.
    """
    about = {"progress": {**asdict(progress), **compared.noted(job.model.vectors)}, "step": progress.step}
    try:
        return se.save_checkpoint(run.checkpoints, job.wrapped, optimizer=job.optimizer, **about, keep=keep, on_nonfinite="raise")
    except CheckpointError as error:
        console.print(f"step {progress.step}: no checkpoint was saved: {error}", soft_wrap=True, highlight=False, markup=False)
        return None


def resume(console: Console, run: Run, job: TrainingJob, steps: int) -> Progress:
    """Load the newest checkpoint of the run. Collective.

    Raises:
        CheckpointError: it cannot be loaded; says what can be done.
    """
    try:
        restored = se.load_checkpoint(run.checkpoints, job.wrapped, optimizer=job.optimizer)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n{run.path} cannot be resumed from its newest checkpoint: remove that one to go on from the one before, or "
            "begin a new run with --fresh"
        ) from error
    told = {name: value for name, value in restored.progress.items() if name != compared.NOTED}
    progress = Progress(**{**told, "losses": tuple(told["losses"])})
    console.print(
        f"resuming {run.path} at step {progress.step} of {steps} (saved on {restored.world_size} rank"
        f"{'s' * (restored.world_size > 1)}, now {se.world_size()}); --fresh begins a new run instead",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return progress
