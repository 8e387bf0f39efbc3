"""Names of checkpoints, and which of them are complete.

step-0000000100       complete: a folder gets this name after all in it has reached the disk
step-0000000100.1     the same step, saved once more; the highest generation counts
step-0000000080-r1    saved after training had gone back behind step 100 (`r`: returns); newer than all without, or with fewer
.saving-...           being written, or what a crash left; the next save removes it
.removed-...          being deleted: renamed first, so that nothing half-deleted looks complete
"""

from __future__ import annotations

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from shardembed.checkpoint.format.checks import STEP_FOLDER
from shardembed.config.paths import local
from shardembed.errors import CheckpointError

SAVING, REMOVED = ".saving-", ".removed-"
MANIFEST = "manifest.json"


@dataclass(frozen=True, order=True)
class Named:
    """A complete checkpoint: what its folder is called, in the order in which they were saved.

    The order lies in the names alone, so that it changes in the one moment in which a save is complete, and costs no reading.

    Attributes:
        returns: how often training had gone back to an earlier checkpoint.
        step: of training.
        generation: how many checkpoints of this step came before.
    """

    returns: int
    step: int
    generation: int

    def __str__(self) -> str:
        returns, generation = f"-r{self.returns}" * (self.returns > 0), f".{self.generation}" * (self.generation > 0)
        return f"step-{self.step:010d}{returns}{generation}"

    @staticmethod
    def of(name: str) -> Named | None:
        match = STEP_FOLDER.fullmatch(name)
        return Named(int(match[2] or 0), int(match[1]), int(match[3] or 0)) if match else None


def listed(root: Path) -> list[Named]:
    """The complete checkpoints of a folder, oldest first; none where there is no such folder.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        with os.scandir(root) as entries:
            names = [Named.of(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{root}: cannot read the folder of checkpoints: {error.strerror}") from None
    return sorted(name for name in names if name is not None)


def newest(root: Path, step: int | None = None) -> Path | None:
    """The newest complete checkpoint (of a step); None where there is none."""
    found = [name for name in listed(root) if step is None or name.step == step]
    return root / str(found[-1]) if found else None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in `folder`; None where there is none. Not collective.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    return newest(local(folder, CheckpointError))


def checkpoints(folder: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every complete checkpoint in `folder`, oldest first. Not collective.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    return [(name.step, Path(folder) / str(name)) for name in listed(local(folder, CheckpointError))]


def chosen(folder: str | Path, step: int | None) -> Path:
    """The checkpoint that is asked for: `folder` itself where it is one (under whatever name it was copied to), else the newest one
    in it (of `step`).

    Raises:
        CheckpointError: there is none; says what there is instead.
    """
    root = local(folder, CheckpointError)
    if not root.name.startswith((SAVING, REMOVED)) and (root / MANIFEST).exists():
        return root
    found = newest(root, step)
    if found is not None:
        return found
    if not root.is_dir():
        raise CheckpointError(f"{root}: there is no such folder")
    steps = sorted({name.step for name in listed(root)})
    if steps:
        raise CheckpointError(f"{root}: no checkpoint of step {step}; there are those of steps {', '.join(map(str, steps[-20:]))}")
    foreign = sorted(path.name for path in root.iterdir() if path.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt", ".distcp"))
    if foreign:
        raise CheckpointError(
            f"{root}: no checkpoint of shardembed, but {foreign[0]}, which torch would unpickle; shardembed reads no pickles. Load "
            "it into a plain model with torch.load(weights_only=True), then load_state_dict into the sharded one"
        )
    raise CheckpointError(f"{root}: there is no complete checkpoint in it")


def new_saving(step: int) -> str:
    """A name for a folder to write into."""
    return f"{SAVING}{step:010d}-{secrets.token_hex(4)}"


def free_name(root: Path, step: int) -> Named:
    """The name that a checkpoint of `step` gets now: newer than all there are, so never an occupied one."""
    last = max(listed(root), default=Named(0, -1, 0))
    if step > last.step:
        return Named(last.returns, step, 0)
    return Named(last.returns, step, last.generation + 1) if step == last.step else Named(last.returns + 1, step, 0)


def leftovers(root: Path) -> list[Path]:
    """Folders that an interrupted save or removal has left."""
    with os.scandir(root) as entries:
        return sorted(root / entry.name for entry in entries if entry.name.startswith((SAVING, REMOVED)))


def remove(path: Path) -> None:
    """Delete a folder. Its name goes first, so that a crash leaves no half of a checkpoint under it."""
    hidden = path
    if not path.name.startswith((SAVING, REMOVED)):
        hidden = path.with_name(f"{REMOVED}{path.name}-{secrets.token_hex(4)}")
        os.rename(path, hidden)
    if hidden.is_symlink() or not hidden.is_dir():
        hidden.unlink(missing_ok=True)
    else:
        shutil.rmtree(hidden)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
