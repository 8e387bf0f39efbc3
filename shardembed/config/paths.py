"""Paths of this machine: those that lead elsewhere, such as s3://bucket/name, are refused but where data are read, since they would
make folders here. And files that are there whole or not at all.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, Any

from shardembed.errors import ConfigError, ShardEmbedError

# pathlib makes one slash of two. A drive of Windows has one letter.
ELSEWHERE = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", flags=re.DOTALL)


def elsewhere(path: str | PathLike[str]) -> str:
    """Why a path is none of this machine; empty where it is one."""
    found = ELSEWHERE.fullmatch(str(path))
    if found is None:
        return ""
    scheme, rest = found.groups()
    if scheme.lower() == "file":
        return f"{scheme}://{rest}: name files and folders by their paths alone, without {scheme}://"
    return (
        f"{scheme}://{rest}: remote paths are neither read nor written, but for files of data, which are read; name a path "
        "on a file system of this machine, or mount it there"
    )


def is_url(path: str | PathLike[str]) -> bool:
    """It leads elsewhere than to a file of this machine, in words that fsspec may know."""
    found = ELSEWHERE.fullmatch(str(path))
    return found is not None and found[1].lower() != "file" and "://" in str(path)


def local(path: str | PathLike[str], error: type[ShardEmbedError] = ConfigError) -> Path:
    """
    Raises:
        ShardEmbedError: `error`, where the path has a scheme.
    """
    if said := elsewhere(path):
        raise error(said)
    return Path(path)


@contextmanager
def whole_file(path: Path, beside: str, **how: Any) -> Iterator[IO[str]]:
    """Write a text file so that it is there whole or not at all. Its name in the folder is not on the disk yet then.

    Args:
        beside: ends its name until it is whole.
        how: as for `open`.
    """
    new = path.with_name(f".{path.name}.{beside}")
    new.unlink(missing_ok=True)  # never through a link that a stranger's folder has there
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        with os.fdopen(descriptor, "w", encoding="utf-8", **how) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)  # half of it would take room that there is not
        raise
