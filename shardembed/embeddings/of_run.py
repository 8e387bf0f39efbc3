"""Which checkpoint of a run of `shardembed train` is meant where the run is named."""

from __future__ import annotations

from pathlib import Path

from shardembed.checkpoint import folders
from shardembed.errors import CheckpointError

CHECKPOINTS, BEST, SUMMARY = "checkpoints", "best", "summary.json"  # in the folder of a run; the last one when it is finished


def checkpoint_of(folder: Path, step: int | None = None) -> Path:
    """The checkpoint that is asked for.

    Args:
        folder: of one checkpoint, of several, of which the newest counts, or of a run: that of its best weights where the run is
            finished and has kept them, else the newest.
        step: the checkpoint of this step.

    Raises:
        CheckpointError: there is none; says what there is instead.
    """
    if not _is_run(folder):
        return folders.chosen(folder, step)
    newest, best = folder / CHECKPOINTS, folder / BEST
    kept = folders.newest(best, step)
    if kept is not None and (step is not None or (folder / SUMMARY).exists()):
        return kept
    return folders.chosen(newest, step)


def _is_run(folder: Path) -> bool:
    try:
        inside = (folder / CHECKPOINTS).is_dir() or (folder / BEST).is_dir()
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be looked into: {error.strerror or error}") from None
    return inside and not (folder / folders.MANIFEST).exists() and not folders.listed(folder)
