"""Files that come along and are chosen by name: in a clone from `configs/`, in an installed package from its shared data."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Literal

from shardembed.config.hints import nearest
from shardembed.errors import ConfigError

Kind = Literal["topologies", "workloads", "train"]
WHAT = {"topologies": "topologies", "workloads": "workloads", "train": "jobs"}
_ROOT = Path(__file__).parents[2]
_BESIDE = ("configs", "share/shardembed")  # of a clone; of `pip install --target`, which moves shared data there


def files(kind: Kind) -> dict[str, Path]:
    """All of a kind, by name."""
    beside = [_ROOT / folder / kind for folder in _BESIDE if (_ROOT / folder / kind).is_dir()]
    if beside:
        found = sorted(beside[0].glob("*.yaml"))
    else:
        try:
            listed = metadata.files("shardembed") or ()
        except metadata.PackageNotFoundError:
            listed = ()
        found = sorted(Path(str(file.locate())).resolve() for file in listed if file.parts[-3:-1] == ("shardembed", kind))
    return {path.stem: path for path in found if not path.stem.startswith("reuse")}


def locate(kind: Kind, name_or_path: str | Path) -> Path:
    """The file that is meant: one that exists, or one that comes along.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = files(kind)
    if str(name_or_path) in known:
        return known[str(name_or_path)]
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(f"{path}: there is no such file; those that come along go by name: {', '.join(known)}")
    raise ConfigError(
        f"{str(name_or_path)!r} is neither a file nor one of the {WHAT[kind]} that come along{nearest(str(name_or_path), known)} "
        f"(they are {', '.join(known)})"
    )
