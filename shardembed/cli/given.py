"""What arguments name, looked at before anything is read: a folder that is not there is a mistake of whoever typed it."""

from __future__ import annotations

from pathlib import Path

from shardembed.errors import CheckpointError, ConfigError


def check_new(out: Path) -> None:
    """
    Raises:
        ConfigError: something has the name of the folder that is to be made.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out: {out} exists, and is not written over: remove it, or name another folder")


def checkpoint_in(folder: Path, step: int | None) -> Path:
    """The checkpoint that is meant by a folder of a run, of checkpoints, or of one, and by a step.

    Raises:
        ConfigError: there is none.
    """
    from shardembed.embeddings.of_run import checkpoint_of

    try:
        return checkpoint_of(folder, step)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
