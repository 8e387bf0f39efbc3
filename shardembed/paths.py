"""Paths that lead elsewhere, such as s3://bucket/name, are refused: as paths of this machine they would make folders here."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

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
        f"{scheme}://{rest}: remote paths are neither read nor written; copy the data to a file system of this machine, or "
        "mount it there, and name the path on that"
    )


def local(path: str | PathLike[str], error: type[ShardEmbedError] = ConfigError) -> Path:
    """
    Raises:
        ShardEmbedError: `error`, where the path has a scheme.
    """
    if said := elsewhere(path):
        raise error(said)
    return Path(path)
