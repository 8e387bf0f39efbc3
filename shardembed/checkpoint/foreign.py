"""`convert_checkpoint`: checkpoints of TorchRec, and others that torch has written, into one of ours.

The only code that unpickles: torch's own formats are pickles, and reading one can run any code that its writer wanted to run.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from math import prod
from pathlib import Path
from typing import Any

import torch

from shardembed._version import __version__
from shardembed.checkpoint import chance, folders
from shardembed.checkpoint.format.blocks import CODES, Block, Chunk, Entry, File, Kind
from shardembed.checkpoint.format.manifest import STATE, Manifest
from shardembed.checkpoint.format.pieces import Part, write_file, write_state
from shardembed.checkpoint.matching import fits
from shardembed.config.paths import local
from shardembed.errors import CheckpointError

METADATA = ".metadata"  # of torch.distributed.checkpoint
TABLE = re.compile(r"(?:.*\.)?(?:embedding_bags|embeddings)\.[^.]+\.weight")
RISK = "reading it unpickles, which can run any code of whoever wrote it: say trusted=True (--trusted) if you trust its source"
SMALL: dict[str, Any] = {
    "progress": None,
    "optimizer": {"class": None, "groups": [], "tables": {}, "skipped": 0},
    "has_optimizer": False,
    **{"steps": {}, "stateful": {}, "model": {}, "scalars": {}},
}


@dataclass(frozen=True)
class Converted:
    """What `convert_checkpoint` wrote.

    Attributes:
        path: of the new checkpoint.
        tables: keys of the tables.
        dense: keys of the other tensors.
        left_out: keys that were not taken, each with why.
    """

    path: Path
    tables: tuple[str, ...]
    dense: tuple[str, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class _Found:
    """A tensor to convert; `read` gives it whole."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def convert_checkpoint(
    source: str | Path,
    folder: str | Path,
    *,
    trusted: bool = False,
    prefix: str = "",
    tables: Sequence[str] = (),
    step: int = 0,
) -> Converted:
    """Write weights of a checkpoint that torch has written as a checkpoint in `folder`; load it with `weights_only=True`.

    Reads a folder of `torch.distributed.checkpoint` (saved on any number of ranks), or a file of `torch.save` with a state dict of
    plain tensors. **Only from a source that you trust**: both are pickles. Needs no process group, and the memory of the largest
    tensor. Optimizer state is left out: its names and meaning are another library's.

    Args:
        prefix: take only keys that begin so, without it: "model." where a dict {"model": state dict} was saved.
        tables: keys or patterns that are tables, beside those of TorchRec's collections (`embedding_bags.NAME.weight`,
            `embeddings.NAME.weight`).
        step: of the checkpoint that is made.

    Raises:
        CheckpointError: `trusted` is not true, the source is no such checkpoint, or the checkpoint cannot be written.
    """
    source, root = local(source, CheckpointError), local(folder, CheckpointError)
    if not trusted:
        raise CheckpointError(f"{source}: {RISK}")
    found, left_out = _of_folder(source) if source.is_dir() else _of_file(source)
    left_out |= {key: f"does not begin with {prefix!r}" for key in found if not key.startswith(prefix)}
    found = {key.removeprefix(prefix): each for key, each in found.items() if key.startswith(prefix)}
    left_out |= {key: f"{each.dtype} cannot be stored" for key, each in found.items() if each.dtype not in CODES}
    found = {key: each for key, each in found.items() if each.dtype in CODES}
    kinds: dict[str, Kind] = {key: "table" if TABLE.fullmatch(key) or fits(tables, key) else "dense" for key in found}
    if not found:
        raise CheckpointError(f"{source}: it has no tensor to convert{f' below {prefix!r}' if prefix else ''}")
    root.mkdir(parents=True, exist_ok=True)
    writing = root / folders.new_saving(step)
    writing.mkdir()
    try:
        entries = dict(_written(writing, found, kinds))
        path = _publish(root, writing, entries, step)
    except BaseException:
        with suppress(OSError):
            folders.remove(writing)
        raise
    named = {kind: tuple(key for key in kinds if kinds[key] == kind) for kind in ("table", "dense")}
    return Converted(path, named["table"], named["dense"], left_out)


def _of_file(path: Path) -> tuple[dict[str, _Found], dict[str, str]]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path}: torch.load(weights_only=True) cannot read it: {str(error).splitlines()[0][:200]}. Sharded tensors cannot be "
            "read from a file of one rank: save with torch.distributed.checkpoint, and give its folder"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds {type(state).__name__}, not a state dict")
    flat = dict(_flat(state))
    tensors = {key: value for key, value in flat.items() if isinstance(value, torch.Tensor)}
    left_out = {key: f"is no tensor but {type(value).__name__}" for key, value in flat.items() if key not in tensors}
    found = {key: _Found(tuple(each.shape), each.dtype, lambda each=each: each.detach()) for key, each in tensors.items()}
    return found, left_out


def _flat(state: dict[Any, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _of_folder(path: Path) -> tuple[dict[str, _Found], dict[str, str]]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    if not (path / METADATA).is_file():
        raise CheckpointError(f"{path} has no {METADATA}: it is no checkpoint of torch.distributed.checkpoint")
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except Exception as error:  # a pickle may raise anything
        raise CheckpointError(f"{path / METADATA} cannot be read: {type(error).__name__}: {error}") from error

    def read(key: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        into = {key: torch.empty(shape, dtype=dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as was asked for
                dcp.load(into, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        except Exception as error:
            raise CheckpointError(f"{path}: {key!r} cannot be read: {type(error).__name__}: {error}") from error
        return into[key]

    found: dict[str, _Found] = {}
    left_out: dict[str, str] = {}
    for key, each in metadata.state_dict_metadata.items():
        if isinstance(each, TensorStorageMetadata):
            arguments = key, tuple(each.size), each.properties.dtype
            found[key] = _Found(*arguments[1:], lambda arguments=arguments: read(*arguments))
        else:
            left_out[key] = "is no tensor"
    return found, left_out


def _written(folder: Path, found: dict[str, _Found], kinds: dict[str, Kind]) -> Iterator[tuple[str, Entry]]:
    """A file a table, so that one is in memory at a time; all else in the last file."""
    tables = [[key] for key in found if kinds[key] == "table"]
    dense = [key for key in found if kinds[key] == "dense"]
    files = [*tables, dense] if dense else tables
    for number, keys in enumerate(files):
        parts = []
        for key in keys:
            tensor = found[key].read()
            flat = tensor.reshape(tensor.shape[0] if tensor.dim() else 1, prod(tensor.shape[1:]))
            parts.append(Part(key, flat, tuple(tensor.shape)))
        blocks = write_file(folder / f"rank-{number:05d}.safetensors", parts, {"format": "shardembed"})
        for key, part in zip(keys, parts, strict=True):
            yield key, _entry(key, found[key], kinds[key], part, blocks[key])


def _entry(key: str, found: _Found, kind: Kind, part: Part, block: Block) -> Entry:
    chunk = Chunk(range(part.rows), range(part.data.shape[1]), block)
    return Entry(key, kind, key, found.shape, found.dtype, (chunk,))


def _publish(root: Path, writing: Path, entries: dict[str, Entry], step: int) -> Path:
    """Small state, manifest, name: in this order, each on the disk before the next."""
    state = write_state(writing / STATE, json.dumps({**SMALL, "random": [chance.capture()]}).encode())
    manifest = Manifest(
        step=step,
        world_size=1,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"shardembed": __version__, "torch": torch.__version__},
        entries=entries,
        files={path.name: File(path.stat().st_size) for path in sorted(writing.iterdir())},
        plans=(),
        state=state,
    )
    described = manifest.to_bytes()
    Manifest.parse(described, str(writing))  # what could not be read again is not published
    write_state(writing / folders.MANIFEST, described)
    folders.sync_folder(writing)
    path = root / str(folders.free_name(root, step))
    os.rename(writing, path)
    folders.sync_folder(root)
    return path
