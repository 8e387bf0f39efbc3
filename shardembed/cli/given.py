"""What arguments name, looked at before anything is read: a folder that is not there is a mistake of whoever typed it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from shardembed.recipes.common import JobConfig


def check_new(out: Path) -> None:
    """
    Raises:
        ConfigError: something has the name of the folder that is to be made.
    """
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--out: {out} exists, and is not written over: remove it, or name another folder")


def run_in(folder: Path) -> JobConfig:
    """The settings of the run of `shardembed train` that is meant, which has weights.

    Raises:
        ConfigError: it is none, or has saved none.
    """
    from shardembed.recipes.use.opened import config_of

    config = config_of(folder)
    checkpoint_in(folder)
    return config


def checkpoint_in(folder: Path, step: int | None = None) -> Path:
    """The checkpoint that is meant by a folder of a run, of checkpoints, or of one, and by a step.

    Raises:
        ConfigError: there is none.
    """
    from shardembed.embeddings.of_run import checkpoint_of

    try:
        return checkpoint_of(folder, step)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
