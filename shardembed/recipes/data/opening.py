"""Data files by name or pattern, and text files opened whether they are compressed with gzip or not."""

from __future__ import annotations

import glob
import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, cast

from shardembed.config.paths import local
from shardembed.errors import DataError

GZIP = b"\x1f\x8b"
OTHERS = {  # how files begin that are taken for text
    b"PK\x03\x04": "is a zip archive; unpack it, or compress the file in it with gzip",
    b"BZh": "is compressed with bzip2; unpack it, or compress it with gzip",
    b"\xfd7zXZ": "is compressed with xz; unpack it, or compress it with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; unpack it, or compress it with gzip",
    b"PAR1": "is a Parquet file; give it the suffix .parquet",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
}
UNREADABLE = (OSError, EOFError, zlib.error)  # of the disk, or of a compressed file that was cut off or damaged


def open_text(path: Path) -> IO[bytes]:
    """The bytes of a text file; of a compressed one, told by how it begins, those in it. Reading may raise any of UNREADABLE.

    Raises:
        DataError: the file cannot be opened, or is of a kind that is no text.
    """
    try:
        with open(path, "rb") as file:
            begins = file.read(8)
        for magic, what in OTHERS.items():
            if begins.startswith(magic):
                raise DataError(f"{path}: {what}")
        return cast("IO[bytes]", gzip.open(path, "rb")) if begins.startswith(GZIP) else open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read the file: {error.strerror or error}") from error


def matched(patterns: Sequence[str], setting: str) -> list[Path]:
    """The files that paths or patterns name; what one pattern matches comes in the order of the names.

    Raises:
        DataError: a pattern matches nothing, a path is a folder, or a file is named twice; `setting` is where they came from.
    """
    found = [path for pattern in patterns for path in _of_pattern(pattern, setting)]
    twice = {path for path in found if found.count(path) > 1}
    if twice:
        raise DataError(f"{setting}: {min(twice)} is named twice; its rows would be read twice")
    if not found:
        raise DataError(f"{setting} names no file")
    return found


def named(patterns: Sequence[str], files: int) -> str:
    """For messages."""
    return ", ".join(patterns) + (f" ({files} files)" if files > 1 else "")


def _of_pattern(pattern: str, setting: str) -> list[Path]:
    path = local(pattern, DataError)
    if path.is_dir():
        raise DataError(f"{setting}: {pattern} is a folder; name the files in it, as in {path / '*.gz'}")
    if path.exists() or not glob.has_magic(pattern):
        return [path]
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))
    if not found:
        raise DataError(f"{setting}: no file matches {pattern}")
    return [one for one in found if one.is_file()]
