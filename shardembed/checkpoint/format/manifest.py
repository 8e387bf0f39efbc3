"""The manifest: all that a checkpoint holds, where each part of it lies, and the hashes that prove it. JSON, written last.

It is read from anybody: `Manifest.parse` believes nothing, and raises CheckpointError for all that it does not accept.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from shardembed.checkpoint.format import fields
from shardembed.checkpoint.format.blocks import Base, Block, Chunk, Entry, File, Listing, Update, hash_of
from shardembed.checkpoint.format.checks import STATE, check_manifest
from shardembed.checkpoint.format.strict import NO_PICKLES, PICKLE_SUFFIXES, folder_opened, loads, read_small
from shardembed.errors import CheckpointError

__all__ = ["STATE", "Base", "Block", "Chunk", "Entry", "File", "Manifest", "Source", "Update", "read_manifest", "resolve"]

FORMAT = 3  # 2 knew no dynamic tables
NAME = "manifest.json"
SIZE_LIMIT = 256 << 20
_FIELDS = {"format", "checksum", "step", "world_size", "created", "versions", "entries", "files", "plans", "state", "base"}
_SINCE = {2: {"previous", "nonfinite"}}  # fields that a format has and the one before had not


class Manifest(Listing):
    """A checkpoint's contents, as the text of a file and back."""

    def to_bytes(self) -> bytes:
        """The file's contents: an entry a line.

        Raises:
            CheckpointError: `parse` would refuse it.
        """
        data = {"format": FORMAT, **self._to_json()}
        data["checksum"] = _checksum(data)
        try:
            check_manifest(self)
        except ValueError as error:
            raise CheckpointError(f"this cannot be saved: {error}") from error
        entries = data.pop("entries")
        head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in data.items())
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
        return f'{{\n{head}"entries": {{\n{lines}\n}}\n}}\n'.encode()

    @cached_property
    def checksum(self) -> str:
        """Hexadecimal digits that two manifests of equal contents share."""
        return _checksum({"format": FORMAT, **self._to_json()})

    def _to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "world_size": self.world_size,
            "created": self.created,
            "versions": dict(self.versions),
            "base": None if self.base is None else {"folder": self.base.folder, "checksum": self.base.checksum},
            "previous": self.previous,
            "nonfinite": list(self.nonfinite),
            "files": {name: {"bytes": file.bytes} for name, file in self.files.items()},
            "state": fields.block_json(self.state),
            "plans": list(self.plans),
            "entries": {key: fields.entry_json(entry) for key, entry in self.entries.items()},
        }

    @staticmethod
    def parse(data: bytes, where: str) -> Manifest:
        """The manifest in `data`; `where` it came from begins every message.

        Raises:
            CheckpointError: it is damaged, altered, inconsistent, or of a newer format.
        """
        if len(data) > SIZE_LIMIT:
            raise CheckpointError(f"{where} has {len(data):,} bytes, and at most {SIZE_LIMIT:,} are read")
        found = loads(data, where)
        try:
            _check_head(found)
            manifest = _manifest(found)
            manifest.__dict__["checksum"] = found["checksum"]  # computed in `_check_head`
            check_manifest(manifest)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{where}: {error}") from error
        return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the checkpoint in `folder`.

    Raises:
        CheckpointError: there is none, it is not valid, or the folder holds pickles.
    """
    with folder_opened(folder) as descriptor:
        names = os.listdir(descriptor)
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles and NAME in names:
            raise CheckpointError(f"{folder} holds {pickles[0]!r}, and {NO_PICKLES}: remove it if you put it there")
        if pickles:
            raise CheckpointError(
                f"{folder} has no {NAME} and holds {pickles[0]!r}: a pickle, as torch.save and torch.distributed.checkpoint write "
                f"it; {NO_PICKLES}: load it with the library that wrote it, and save it with this one"
            )
        if NAME not in names:
            raise CheckpointError(f"{folder} has no {NAME}: it is no complete checkpoint; a complete one is named step-NNNNNNNNNN")
        where = str(folder / NAME)
        return Manifest.parse(read_small(descriptor, NAME, where, SIZE_LIMIT), where)


@dataclass(frozen=True)
class Source:
    """Where an entry's values come from: first all chunks, then updates. Of a dynamic table, first the updates below, then its own.

    Attributes:
        entry: the tensor.
        chunks_in: the folder of the chunks.
        chunks: which hold each element once.
        updates_in: the folder of the updates.
        updates: rows that are newer than the chunks.
        below: of a dynamic table, the rows of the checkpoint below, which lie where chunks do.
    """

    entry: Entry
    chunks_in: Path
    chunks: tuple[Chunk, ...]
    updates_in: Path
    updates: tuple[Update, ...]
    below: tuple[Update, ...] = ()

    @property
    def layers(self) -> tuple[tuple[Path, tuple[Update, ...]], ...]:
        """Updates and the folder that each lie in, the newest last."""
        return (self.chunks_in, self.below), (self.updates_in, self.updates)


def resolve(manifest: Manifest, folder: Path) -> tuple[dict[Path, Manifest], dict[str, Source]]:
    """The manifests to read (of `folder`, and of the full checkpoint that it stands on), and every entry's source, by key.

    Raises:
        CheckpointError: the full checkpoint is missing, is another one, or does not have what is needed from it.
    """
    if manifest.base is None:
        return {folder: manifest}, {key: _alone(entry, folder) for key, entry in manifest.entries.items()}
    below = folder.absolute().parent / manifest.base.folder  # the name is checked: no separator, no dots
    stands = f"{folder} holds changes since {manifest.base.folder}"
    try:
        full = read_manifest(below)
    except CheckpointError as error:
        raise CheckpointError(f"{stands}, which cannot be read: {error}") from error
    if full.checksum != manifest.base.checksum or full.base is not None:
        raise CheckpointError(f"{stands}, and {below} is another checkpoint than that: load an older checkpoint with step=")
    sources = {}
    for key, entry in manifest.entries.items():
        if entry.by_id.whole if entry.by_id is not None else entry.chunks or entry.rows * entry.columns == 0:
            sources[key] = _alone(entry, folder)
            continue
        whole = full.entries.get(key)
        if whole is None or _seen_alike(whole) != _seen_alike(entry):
            raise CheckpointError(f"{stands}, which has no {key!r} of {entry.shape} in {entry.dtype}")
        sources[key] = Source(entry, below, whole.chunks, folder, entry.updates, whole.updates)
    return {folder: manifest, below: full}, sources


def _alone(entry: Entry, folder: Path) -> Source:
    return Source(entry, folder, entry.chunks, folder, entry.updates)


def _seen_alike(entry: Entry) -> tuple[object, ...]:
    """What an increment and what it stands on have in common: of a dynamic table, all but how many rows there are."""
    buckets = None if entry.by_id is None else entry.by_id.buckets
    return entry.shape if buckets is None else entry.shape[1:], entry.dtype, buckets


def _checksum(data: dict[str, Any]) -> str:
    """Over everything but the checksum itself, however the file is laid out."""
    return hash_of(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def _check_head(data: Any) -> None:
    if not isinstance(data, dict) or "format" not in data:
        raise ValueError("this is not the manifest of a checkpoint")
    written = data["format"]
    if type(written) is not int or written < 1:
        raise ValueError(f"format {written!r:.40} does not exist")
    if written > FORMAT:
        raise ValueError(
            f"the checkpoint was written by a newer version of shardembed: format {written}, this version reads up to {FORMAT}; "
            "update shardembed"
        )
    computed = _checksum({name: value for name, value in data.items() if name != "checksum"})
    if data.get("checksum") != computed:
        raise ValueError(
            f"the manifest is damaged (checksum {data.get('checksum')!r:.60}, its contents have {computed!r}): restore the file, "
            "or load an older checkpoint with step="
        )
    fields.expect(data, _FIELDS.union(*(names for since, names in _SINCE.items() if since <= written)))


def _manifest(data: dict[str, Any]) -> Manifest:
    base = data["base"]
    if base is not None:
        fields.expect(base, {"folder", "checksum"}, "base: ")
        base = Base(fields.text(base["folder"], "base folder"), fields.text(base["checksum"], "base checksum"))
    versions = fields.read_object(data["versions"], "versions")
    plans = fields.read_list(data["plans"], "plans")
    previous = data.get("previous")
    return Manifest(
        step=fields.number(data["step"], "step"),
        world_size=fields.number(data["world_size"], "world_size"),
        created=fields.text(data["created"], "created"),
        versions={name: fields.text(value, "versions") for name, value in versions.items()},
        entries=fields.each(data["entries"], "entries", "tensor", fields.read_entry),
        files=fields.each(data["files"], "files", "file", fields.read_file),
        plans=tuple(fields.read_object(plan, "plans") for plan in plans),
        state=fields.read_block(data["state"], fields.BLOCK),
        base=base,
        previous=None if previous is None else fields.text(previous, "previous"),
        nonfinite=tuple(fields.text(key, "nonfinite") for key in fields.read_list(data.get("nonfinite", []), "nonfinite")),
    )
