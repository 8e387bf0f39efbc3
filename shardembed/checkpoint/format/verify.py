"""Whether a checkpoint is whole: every piece is read and hashed, and all that is wrong is found, not only the first."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from shardembed.checkpoint.format.blocks import Block
from shardembed.checkpoint.format.checks import STATE
from shardembed.checkpoint.format.files import Files
from shardembed.checkpoint.format.manifest import NAME, Manifest, read_manifest, resolve
from shardembed.checkpoint.format.pieces import read_ids
from shardembed.checkpoint.format.reading import check_piece
from shardembed.checkpoint.format.workers import Scratch, spread
from shardembed.errors import CheckpointError

Progress = Callable[[int], None]  # is told how many bytes more have been read


@dataclass(frozen=True)
class Problem:
    """Something wrong in a checkpoint.

    Attributes:
        folder: of the checkpoint, or of the one that it stands on.
        file: where it is; empty where it is in none.
        key: of the tensor; empty where it is in none.
        text: all of it in words.
    """

    folder: Path
    file: str
    key: str
    text: str


def verify(folder: Path, workers: int = 2, progress: Progress = lambda _: None) -> list[Problem]:
    """Read all of the checkpoint in `folder`, and of the full one that it stands on; returns what is wrong.

    Raises:
        CheckpointError: there is no manifest that can be believed.
    """
    manifests, _ = resolve(read_manifest(folder), folder)
    return verify_each(manifests, workers, progress)


def verify_each(manifests: Mapping[Path, Manifest], workers: int = 2, progress: Progress = lambda _: None) -> list[Problem]:
    """As `verify`, for folders whose manifests have been read."""
    found: list[Problem] = []
    for each, manifest in manifests.items():
        found += _strangers(each, manifest)
        with Files(each, manifest) as files:
            sound = {name for name in manifest.files if not _opening(files, name, found)}
            _hash_all(files, sound, found, workers, progress)
            if not found:
                found += _strange_ids(files)
    return sorted(found, key=lambda problem: (str(problem.folder), problem.file, problem.text))


def size_of(manifests: Mapping[Path, Manifest]) -> int:
    """How many bytes `verify_each` hashes, about: all but headers."""
    return sum(file.bytes for manifest in manifests.values() for file in manifest.files.values())


def _strangers(folder: Path, manifest: Manifest) -> list[Problem]:
    names = sorted(set(os.listdir(folder)) - {NAME, *manifest.files})
    return [Problem(folder, name, "", f"{folder / name} is not a file of this checkpoint, and is never read") for name in names]


def _opening(files: Files, name: str, found: list[Problem]) -> bool:
    """Whether the file cannot be used at all; adds why to `found`."""
    try:
        with files.opened(name):
            return False
    except CheckpointError as error:
        found.append(Problem(files.folder, name, "", str(error)))
        return True


def _hash_all(files: Files, names: set[str], found: list[Problem], workers: int, progress: Progress) -> None:
    lock = threading.Lock()

    def check(task: tuple[Block, int, int, str], scratch: Scratch) -> None:
        block, row_bytes, number, key = task
        try:
            size = check_piece(files, block, row_bytes, number, scratch)
        except CheckpointError as error:
            with lock:
                found.append(Problem(files.folder, block.file, key, str(error)))
            return
        with lock:
            progress(size)

    tasks = (task for task in _pieces(files.manifest) if task[0].file in names)
    spread(tasks, check, workers)


def _strange_ids(files: Files) -> list[Problem]:
    """Ids of dynamic tables that are twice in a shard, or belong to another."""
    found: list[Problem] = []
    for key, entry in files.manifest.entries.items():
        for update in entry.updates if entry.by_id is not None else ():
            try:
                for _ in read_ids(files, entry, update):
                    pass
            except CheckpointError as error:
                found.append(Problem(files.folder, update.ids.file, key, str(error)))
    return found


def _pieces(manifest: Manifest) -> Iterator[tuple[Block, int, int, str]]:
    """(block, bytes of a row, piece, key) of everything, in the order of the files."""
    blocks: list[tuple[Block, int, str]] = [(manifest.state, 1, "")]
    for key, entry in manifest.entries.items():
        size = entry.dtype.itemsize
        blocks += [(chunk.block, len(chunk.columns) * size, key) for chunk in entry.chunks]
        for update in entry.updates:
            blocks += [(update.ids, torch.int64.itemsize, key), (update.values, len(update.columns) * size, key)]
        blocks += [(block, torch.int64.itemsize, key) for block in entry.dropped]
    for block, row_bytes, key in sorted(blocks, key=lambda each: (each[0].file != STATE, each[0].file, each[0].offset)):
        yield from ((block, row_bytes, number, key) for number in range(len(block.hashes)))
