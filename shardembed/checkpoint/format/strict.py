"""Untrusted input: small files opened without following links, and JSON read without surprises.

A file may have been put there by somebody else: it can be a link out of the folder, a pipe that never answers, or far too large.
What its JSON can be is said in `config.plain_json`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardembed.config import plain_json
from shardembed.errors import CheckpointError

_NOT_FOLLOWED = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
PICKLE_SUFFIXES = (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".distcp", ".metadata", ".joblib")
_PICKLE_STARTS = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # torch.save's archive, and plain pickles
NO_PICKLES = "pickles are never read here, since reading one can run any code"


@contextmanager
def folder_opened(folder: Path) -> Iterator[int]:
    """A descriptor of `folder`, which must not be a link: files are then opened in it whatever happens to its name."""
    try:
        descriptor = os.open(folder, _NOT_FOLLOWED | os.O_DIRECTORY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a symbolic link, which is not followed: give the folder itself") from error
        raise CheckpointError(f"{folder}: not a folder that can be opened: {_reason(error)}") from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def open_regular(folder: int, name: str, where: str) -> tuple[int, int]:
    """A descriptor of the regular file `name` in the open `folder`, and its size; never waits and never follows a link."""
    try:
        descriptor = os.open(name, _NOT_FOLLOWED | os.O_NONBLOCK, dir_fd=folder)  # opening a pipe would wait for a writer
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} is missing: restore the file, or load an older checkpoint with step=") from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be opened: {_reason(error)}; links are not followed") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{where} is not a regular file: restore the file, or load an older checkpoint with step=")
    return descriptor, status.st_size


def read_small(folder: int, name: str, where: str, limit: int) -> bytes:
    """The whole file `name` of the open `folder`, which must not have more than `limit` bytes."""
    descriptor, size = open_regular(folder, name, where)
    with open(descriptor, "rb", buffering=0) as file:
        if size > limit:
            raise CheckpointError(f"{where} has {size:,} bytes, and at most {limit:,} are read: this is no file of a checkpoint")
        parts = []
        while size > 0 and (part := file.read(size)):  # never more than was promised, should the file grow meanwhile
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


def refuse_pickle(head: bytes, where: str) -> None:
    if head.startswith(_PICKLE_STARTS):
        raise CheckpointError(f"{where} holds a pickle (as torch.save writes it), not what its name says: {NO_PICKLES}")


def loads(data: bytes, where: str, floats: bool = False) -> Any:
    """The JSON text `data`: whole numbers only, unless `floats` are welcome; every key once.

    Raises:
        CheckpointError: it is anything else; the message begins with `where`.
    """
    refuse_pickle(data, where)
    try:
        return plain_json.loads(data, floats)
    except ValueError as error:
        raise CheckpointError(f"{where} is not valid JSON of a checkpoint: {error}") from error


def _reason(error: Exception) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
