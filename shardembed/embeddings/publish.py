"""Folders and files that appear whole or not at all: written beside their place, brought to the disk, and then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shardembed.checkpoint.folders import sync_folder
from shardembed.config.paths import local
from shardembed.errors import ExportError

WRITING = ".exporting-"


@contextmanager
def new_folder(target: Path, needed: int) -> Iterator[Path]:
    """A folder to write into, which is `target` when the `with` ends well; otherwise nothing is left of it.

    Raises:
        ExportError: `target` exists, the disk lacks room for `needed` bytes, or something cannot be written.
    """
    parent = local(target, ExportError).absolute().parent
    if target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists, and is not written over: remove it, or name another folder")
    if not parent.is_dir():
        raise ExportError(f"{target}: there is no folder {parent}")
    with told(target):
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ExportError(f"{target}: the export takes {needed:,} bytes, and {free:,} are free there")
        writing = parent / f"{WRITING}{target.name}-{secrets.token_hex(4)}"
        writing.mkdir()
        try:
            yield writing
            sync_folder(writing)
            os.rename(writing, target)
        except BaseException:
            with suppress(OSError):
                shutil.rmtree(writing)
            raise
        sync_folder(parent)


def new_file(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a file, which then gets the name `target`; one that is there is replaced by it."""
    writing = target.with_name(f"{WRITING}{secrets.token_hex(4)}-{target.name}")  # the suffix stays: it may tell a format
    with told(target):
        try:
            write(writing)
            sync_file(writing)
            os.replace(writing, target)
        except BaseException:
            with suppress(OSError):
                writing.unlink(missing_ok=True)
            raise
        sync_folder(target.absolute().parent)


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def told(what: object, *others: type[Exception]) -> Iterator[None]:
    """Around what writes a file: what goes wrong with that, or is one of `others`, is an ExportError that names `what`."""
    try:
        yield
    except (OSError, *others) as error:
        raise ExportError(f"{what} cannot be written: {getattr(error, 'strerror', None) or error}") from error
