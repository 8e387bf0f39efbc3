"""The best weights of a run: a checkpoint in RUN/best, with the highest score of all evaluations so far.

It is the checkpoint that was saved after that evaluation, under its own name, with hard links to its files: they take no room
while the run's checkpoints still have it, and stay when those let go of it. Its name appears when all in it has reached the disk,
and only then the one before is removed, so a crash leaves the one or the other, or both, of which the newer counts.

Which score it has is noted in the checkpoints themselves (`Progress.kept`). Where a run goes on from one that tells of another best
than lies there, `settle` brings them together.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from rich.console import Console

import shardembed as se
from shardembed.checkpoint import folders
from shardembed.comm.comm import Comm
from shardembed.embeddings.of_run import BEST
from shardembed.errors import CheckpointError
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.common import JobConfig
from shardembed.recipes.runs import Run
from shardembed.recipes.saving import Progress, is_higher

UNSCORED = {"every_steps", "patience", "min_gain", "keep"}  # settings of an evaluation that change no score


def wanted(config: JobConfig) -> bool:
    """Whether a run keeps its best weights. Without checkpoints there is nothing to keep them in."""
    return config.eval.keep == "best" and config.checkpoint.every_steps is not None


def measured(config: JobConfig) -> str:
    """What scores are measured by: those by another rule do not compare."""
    return json.dumps(config.eval.model_dump(mode="json", exclude=UNSCORED), sort_keys=True)


def scored(progress: Progress, score: float, config: JobConfig) -> Progress:
    """After an evaluation of the weights of this step: they are the best, or not."""
    if is_higher(score, progress.kept):
        return replace(progress, kept=score, kept_step=progress.step, kept_by=measured(config))
    return progress


def keep(console: Console, run: Run, checkpoint: Path) -> None:
    """Let the checkpoint be the best from now on. Rank 0 does it; where it cannot, that is said, and the one before stays."""
    if run.folder is None:
        return
    root = run.path / BEST
    try:
        _link(checkpoint, root)
        for name in folders.listed(root):
            if str(name) != checkpoint.name:
                folders.remove(root / str(name))
    except (OSError, CheckpointError) as error:
        said = getattr(error, "strerror", None) or error
        console.print(f"the best weights so far cannot be kept in {root}: {said}", soft_wrap=True, highlight=False, markup=False)


def settle(console: Console, run: Run, progress: Progress, config: JobConfig) -> Progress:
    """Where a run goes on from a checkpoint, of which this is the progress. Collective.

    The best is what that tells of. If it is the checkpoint itself, a crash may have come before it was kept; and if it is another
    than lies there, or was measured by another rule, it is forgotten.
    """
    if not wanted(config):
        return replace(progress, kept=None)
    if run.folder is not None and progress.kept is not None and progress.kept_step == progress.step:
        newest = folders.newest(run.checkpoints)
        if newest is not None:
            keep(console, run, newest)
    found = _kept(run)
    if found is not None and found.step == progress.kept_step and progress.kept_by == measured(config):
        return progress
    drop(run)  # a checkpoint of its name may come again
    return replace(progress, kept=None)


def load(console: Console, run: Run, job: TrainingJob, step: int) -> int:
    """Bring back the best weights where they are not those of `step`, which the job has now; returns whose it has then. Best ones
    that are damaged are let go of, and the newest come back. Collective.

    Raises:
        CheckpointError: on all ranks: these cannot be loaded either.
    """
    found = _kept(run)
    if found is None or found.step == step:
        return step
    try:
        se.load_checkpoint(run.path.absolute() / BEST / str(found), job.wrapped, optimizer=job.optimizer)
    except CheckpointError as error:  # the same on all ranks
        console.print(
            f"the best weights cannot be loaded, so the newest are used: {error}", soft_wrap=True, highlight=False, markup=False
        )
        restored = se.load_checkpoint(run.checkpoints, job.wrapped, optimizer=job.optimizer)
        drop(run)
        return restored.step
    return found.step


def drop(run: Run) -> None:
    """Of a run that ends with its last weights: what it had kept before it was told to. Rank 0 does it."""
    if run.folder is not None:
        shutil.rmtree(run.path / BEST, ignore_errors=True)


def _kept(run: Run) -> folders.Named | None:
    """The checkpoint that is kept, the same on all ranks; None where there is none. Collective: rank 0 looks."""
    return folders.Named.of(Comm.of().gather_texts("control", "find the best weights", _there(run))[0])


def _there(run: Run) -> str:
    """The name of the checkpoint that is kept; empty on other ranks than 0, and where there is none."""
    if run.folder is None:
        return ""
    try:
        found = folders.newest(run.path / BEST)
    except CheckpointError:
        return ""
    return found.name if found is not None else ""


def _link(checkpoint: Path, root: Path) -> None:
    """The checkpoint under its name in `root`, whole or not at all."""
    root.mkdir(exist_ok=True)
    for left in folders.leftovers(root):
        folders.remove(left)
    if (root / checkpoint.name).exists():
        return
    made = root / folders.new_saving(0)
    shutil.copytree(checkpoint, made, copy_function=_linked)
    for folder, _, _ in os.walk(made):
        folders.sync_folder(Path(folder))
    os.rename(made, root / checkpoint.name)
    folders.sync_folder(root)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        with open(source, "rb") as read, open(target, "xb") as written:
            shutil.copyfileobj(read, written)
            written.flush()
            os.fsync(written.fileno())
