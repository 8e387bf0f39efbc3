"""Data files by name, folder or pattern, on this machine or wherever fsspec reaches, and text files opened whether they are
compressed or not.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import unquote

from shardembed.config.paths import is_url, local
from shardembed.errors import DataError

PACKED = {  # how files begin that are compressed -> what opens them
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: _zstd(file),
}
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
PARQUET_SUFFIXES = (".parquet", ".pq")
TEXT_SUFFIXES = (".csv", ".tsv")
OTHERS = {  # how files begin that are taken for text
    b"PK\x03\x04": "is a zip archive; unpack it, or compress the file in it with gzip",
    b"PAR1": "is a Parquet file; give it the suffix .parquet",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of the disk, or of a compressed file that was cut off or damaged
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
HIDDEN = ("_", ".")


@dataclass(frozen=True)
class Place:
    """Where a file is.

    Attributes:
        path: of this machine, or a URL.
    """

    path: str

    def __str__(self) -> str:
        return self.path

    @property
    def suffix(self) -> str:
        """In small letters, without the one that says how it is compressed."""
        name = PurePosixPath(self.path)
        return (PurePosixPath(name.stem) if name.suffix.lower() in PACKED_SUFFIXES else name).suffix.lower()

    @property
    def partitions(self) -> dict[str, str | None]:
        """The columns that the names of its folders give, as in day=2024-01-01/part.parquet; None for a missing value."""
        found = (folder.partition("=") for folder in PurePosixPath(self.path).parts[:-1])
        return {key: None if value == NO_PARTITION else unquote(value) for key, sign, value in found if sign and key}

    def open(self) -> IO[bytes]:
        """
        Raises:
            DataError: it cannot be opened.
        """
        try:
            if is_url(self.path):
                system, path = _file_system(self.path)
                return cast("IO[bytes]", system.open(path, "rb"))
            return open(self.path, "rb")
        except OSError as error:
            raise DataError(f"{self.path}: cannot read the file: {error.strerror or error}") from error


@contextmanager
def open_text(place: Place) -> Iterator[IO[bytes]]:
    """The bytes of a text file; of a compressed one, told by how it begins, those in it. Reading may raise any of UNREADABLE.

    Raises:
        DataError: the file cannot be opened, or is of a kind that is no text.
    """
    with place.open() as file:
        try:
            begins = file.read(8)
            file.seek(0)
        except OSError as error:
            raise DataError(f"{place}: cannot read the file: {error.strerror or error}") from error
        for magic, what in OTHERS.items():
            if begins.startswith(magic):
                raise DataError(f"{place}: {what}")
        unpack = next((found for magic, found in PACKED.items() if begins.startswith(magic)), None)
        yield cast("IO[bytes]", unpack(file)) if unpack is not None else file  # type: ignore[operator]


def _zstd(file: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")


def matched(patterns: Sequence[str], setting: str, of_data: Callable[[str], bool] = lambda suffix: True) -> list[Place]:
    """The files that paths, folders or patterns name; what one of them names comes in the order of the names. Of a folder these are
    all data files in it and in its folders, but hidden ones.

    Args:
        setting: where they came from, for messages. of_data: whether a file with that suffix in a folder is one of data.

    Raises:
        DataError: a pattern matches nothing, a folder is empty, or a file is named twice.
    """
    found = [place for pattern in patterns for place in _of_pattern(pattern, setting, of_data)]
    twice = {place.path for place in found if found.count(place) > 1} if len(set(found)) < len(found) else ()
    if twice:
        raise DataError(f"{setting}: {min(twice)} is named twice; its rows would be read twice")
    if not found:
        raise DataError(f"{setting} names no file")
    return found


def named(patterns: Sequence[str], files: int) -> str:
    """For messages."""
    return ", ".join(patterns) + (f" ({files} files)" if files > 1 else "")


def _of_pattern(pattern: str, setting: str, of_data: Callable[[str], bool]) -> list[Place]:
    if is_url(pattern):
        return _of_url(pattern, setting, of_data)
    path = local(pattern, DataError)
    if path.is_dir():
        return _in_folder(pattern, [str(one) for one in path.rglob("*") if one.is_file()], str(path), setting, of_data)
    if path.exists() or not glob.has_magic(pattern):
        return [Place(str(path))]
    found: list[Place] = []
    for name in sorted(glob.glob(pattern, recursive=True)):
        if Path(name).is_file():
            found.append(Place(str(Path(name))))
        elif "=" in Path(name).name:  # a pattern of partitions, which are folders
            found += _of_pattern(name, setting, of_data)
    if not found:
        raise DataError(f"{setting}: no file matches {pattern}")
    return found


def _of_url(pattern: str, setting: str, of_data: Callable[[str], bool]) -> list[Place]:
    system, path = _file_system(pattern)
    try:
        if system.isdir(path):
            names = [system.unstrip_protocol(one) for one in system.find(path)]
            return _in_folder(pattern, names, system.unstrip_protocol(path), setting, of_data)
        if not glob.has_magic(path):
            return [Place(pattern)]
        found = sorted(system.unstrip_protocol(one) for one in system.glob(path))
        found = [one for one in found if system.isfile(one)]
    except Exception as error:  # each file system has errors of its own
        raise DataError(f"{setting}: {pattern}: cannot be listed: {type(error).__name__}: {error}") from error
    if not found:
        raise DataError(f"{setting}: no file matches {pattern}")
    return [Place(one) for one in found]


def _in_folder(given: str, names: Sequence[str], folder: str, setting: str, of_data: Callable[[str], bool]) -> list[Place]:
    """Those of the files in a folder that hold data."""
    places = [Place(name) for name in sorted(names) if not _is_hidden(name.removeprefix(folder))]
    found = [place for place in places if of_data(place.suffix)]
    if not found:
        known = ", ".join((*TEXT_SUFFIXES, *(f"{one}.gz" for one in TEXT_SUFFIXES), *PARQUET_SUFFIXES))
        raise DataError(f"{setting}: {given} is a folder without a data file; those have one of the suffixes {known}")
    return found


def _is_hidden(name: str) -> bool:
    return any(part.startswith(HIDDEN) and "=" not in part for part in PurePosixPath(name).parts)


def _file_system(url: str) -> tuple[Any, str]:
    """
    Raises:
        DataError: fsspec or what it needs for this URL is not installed.
    """
    scheme = url.partition(":")[0]
    try:
        from fsspec.core import url_to_fs

        return url_to_fs(url)
    except ImportError as error:
        raise DataError(f"{url}: to read {scheme}:// takes more packages: {error}; pip install 'shardembed[remote]'") from error
    except Exception as error:  # each file system has errors of its own
        raise DataError(f"{url}: cannot be opened: {type(error).__name__}: {error}") from error
