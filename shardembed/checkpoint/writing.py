"""From a snapshot to a complete checkpoint. Collective, stage by stage; what fails on one rank fails on all.

    1  rank 0 removes leftovers, looks whether there is room, and makes a folder with a name that nobody loads
    2  every rank writes one file and brings it to the disk
    3  rank 0 writes the small state and, last, the manifest; gives the folder its name; brings that to the disk
    4  rank 0 removes what need not be kept (`retention.py`)

A crash before the renaming leaves a leftover and all older checkpoints; one after it leaves a complete new one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from shardembed._version import __version__
from shardembed.checkpoint import folders, retention
from shardembed.checkpoint.format.blocks import Base, Block, ById, Chunk, Entry, File, Update
from shardembed.checkpoint.format.checks import STATE
from shardembed.checkpoint.format.manifest import Manifest, read_manifest
from shardembed.checkpoint.format.pieces import Part, write_file, write_state
from shardembed.checkpoint.inventory import Item
from shardembed.checkpoint.sharing import Saved, changes
from shardembed.checkpoint.snapshot import Snapshot
from shardembed.checkpoint.together import on_first, together
from shardembed.comm.comm import Comm
from shardembed.errors import CheckpointError, NonFiniteError

LOCK = ".lock"
SPARE_BYTES = 16 << 20  # for small state, manifest and folders


@dataclass(frozen=True)
class Terms:
    """How a checkpoint is written.

    Attributes:
        keep: of how many steps checkpoints stay; None for all.
        base: as increments of that one; None for a full checkpoint.
        previous: the checkpoint in the same folder that the model has come from.
        finite: write none that holds inf or nan.
    """

    keep: int | None
    base: Base | None
    previous: str | None
    finite: bool


def write(root: Path, snapshot: Snapshot, comm: Comm, terms: Terms) -> tuple[Path, Base]:
    """Write a checkpoint into `root`. Returns its folder, and what increments of it stand on.

    Raises:
        CheckpointError: on every rank, where any failed. Nothing that was complete before has been touched.
        NonFiniteError: on every rank: the terms forbid inf and nan, and it would hold some; likewise.
    """
    sizes = together(comm, "add up sizes", lambda: str(sum(part.bytes for part in snapshot.parts)))
    # All ranks enter or none: the lock is taken by rank 0, and its failure is everybody's.
    with _locked(root, comm):
        saving = root / on_first(comm, "make a folder", lambda: _prepare(root, snapshot.step, sum(map(int, sizes))), long=True)
        try:
            reports = _write_files(saving, snapshot, comm)
            said = on_first(comm, "publish", lambda: _publish(root, saving, snapshot, reports, comm.world_size, terms), long=True)
            name, checksum, nonfinite = json.loads(said)
            if not name:
                error = NonFiniteError(
                    f"{root}: no checkpoint of step {snapshot.step} was saved, since inf or nan is in {retention.said(nonfinite)}; "
                    "older ones are as they were"
                )
                error.places = tuple(nonfinite)
                raise error
        except (CheckpointError, NonFiniteError):
            # All have stopped writing: they agreed that it failed.
            on_first(comm, "remove what was written", lambda: _remove(saving), long=True)
            raise
        if comm.rank == 0:
            _clean(root, terms.keep, name)
            retention.warn_of(root / name, nonfinite)
    return root / name, Base(name, checksum)


@contextmanager
def _locked(root: Path, comm: Comm) -> Iterator[None]:
    """Only one job at a time saves into a folder: it removes what looks like leftovers. A crash releases the lock."""
    held: list[int] = []

    def lock() -> str:
        root.mkdir(parents=True, exist_ok=True)
        held.append(os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))
        try:
            fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{root}: another job is saving into this folder; give every job its own") from None
        except OSError as error:  # a file system without locks: nothing to be had, and nothing lost
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        return ""

    try:
        on_first(comm, "lock the folder", lock)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _prepare(root: Path, step: int, size: int) -> str:
    for path in folders.leftovers(root):
        folders.remove(path)
    free = shutil.disk_usage(root).free
    if free < size + SPARE_BYTES:
        raise CheckpointError(
            f"{root}: the checkpoint of step {step} needs {size + SPARE_BYTES:,} bytes, {free:,} are free; make room, keep fewer "
            "(keep=), or save elsewhere. Nothing was written"
        )
    name = folders.new_saving(step)
    (root / name).mkdir()
    return name


def _write_files(saving: Path, snapshot: Snapshot, comm: Comm) -> list[dict[str, Any]]:
    """Write this rank's file. Rank 0 gets what every rank wrote; the others nothing."""
    report: dict[str, Any] = {"parts": [], "bytes": 0, "scalars": snapshot.scalars, "random": snapshot.random}

    def work() -> str:
        if not saving.is_dir():
            raise CheckpointError(
                f"{saving}: rank 0 made this folder, and it is not to be seen here; all ranks need one file system"
            )
        if snapshot.parts:
            file = saving / f"rank-{comm.rank:05d}.safetensors"
            report["parts"] = _write_parts(file, snapshot.parts, snapshot.buffers)
            report["file"], report["bytes"] = file.name, file.stat().st_size
        return ""

    together(comm, "write", work, long=True)
    # Not in `work`: these texts are long, and rank 0 alone needs them.
    return [
        json.loads(text) for text in comm.gather_texts("control", "checkpoint: tell what was written", json.dumps(report), to=0)
    ]


def _write_parts(file: Path, parts: Sequence[Saved], buffers: Collection[str]) -> list[dict[str, Any]]:
    nonfinite: set[str] = set()
    written: list[Part] = []
    for saved in parts:
        # One name and one block for rows as they lie; two for an increment or ids, row numbers and values; ids that are gone are a
        # third (`_entries` goes by that).
        if saved.ids is None or saved.listed is None:
            whole = saved.names[0] == saved.item.key
            written.append(Part(saved.names[0], saved.data, saved.item.shape if whole else None))
        else:
            written += [Part(saved.names[0], saved.ids.unsqueeze(1)), Part(saved.names[1], saved.data, listed=saved.listed)]
            written += [] if saved.dropped is None else [Part(saved.names[2], saved.dropped.unsqueeze(1))]
    blocks = write_file(file, written, {"format": "shardembed"}, nonfinite=nonfinite)
    strange = {saved.names for saved in parts if nonfinite.intersection(saved.names) and saved.item.key not in buffers}
    return [_report(saved, [blocks[name] for name in saved.names], saved.names not in strange) for saved in parts]


def _report(saved: Saved, blocks: list[Block], finite: bool) -> dict[str, Any]:
    item = saved.item
    return {
        "key": item.key,
        "kind": item.kind,
        "of": item.of,
        "shape": list(item.shape),
        "dtype": str(item.dtype).removeprefix("torch."),
        "rows": [saved.rows.start, saved.rows.stop, saved.rows.step],
        "columns": [saved.columns.start, saved.columns.stop],
        "finite": finite,
        "living": saved.living,
        "blocks": [[block.offset, block.bytes, block.rows_a_piece, list(block.hashes)] for block in blocks],
    }


def _publish(root: Path, saving: Path, snapshot: Snapshot, reports: list[dict[str, Any]], world_size: int, terms: Terms) -> str:
    """Small state, manifest, name: in this order, each on the disk before the next. Returns name, checksum, and what is not finite;
    no name where it is refused for that.
    """
    nonfinite = _nonfinite(root, reports, terms.base)
    if nonfinite and terms.finite:
        return json.dumps(["", "", nonfinite])
    scalars: dict[str, dict[str, Any]] = {}
    for report in reports:
        for key, values in report["scalars"].items():
            # State of a parameter that several ranks have alike: the first one's stands for all.
            scalars.setdefault(key, values)
    small = {**snapshot.small, "scalars": scalars, "random": [report["random"] for report in reports]}
    state = write_state(saving / STATE, json.dumps(small).encode())
    files = {report["file"]: File(report["bytes"]) for report in reports if report["bytes"]}
    manifest = Manifest(
        step=snapshot.step,
        world_size=world_size,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"shardembed": __version__, "torch": torch.__version__},
        entries=_entries(snapshot, reports, terms.base is not None),
        files={**files, STATE: File(state.bytes)},
        plans=tuple(snapshot.plans),
        state=state,
        base=terms.base,
        previous=terms.previous,
        nonfinite=tuple(nonfinite),
    )
    described = manifest.to_bytes()
    Manifest.parse(described, str(saving))  # what could not be read again is not published
    write_state(saving / folders.MANIFEST, described)
    folders.sync_folder(saving)
    name = str(folders.free_name(root, snapshot.step))
    # The moment in which the checkpoint becomes one: before it there is a leftover, after it a complete checkpoint.
    os.rename(saving, root / name)
    folders.sync_folder(root)
    return json.dumps([name, manifest.checksum, nonfinite])


def _nonfinite(root: Path, reports: list[dict[str, Any]], base: Base | None) -> list[str]:
    """The tensors that hold inf or nan. An increment has what it stands on, too: a row that is lost stays so."""
    found = {part["key"] for report in reports for part in report["parts"] if not part["finite"]}
    if base is not None:
        found.update(read_manifest(root / base.folder).nonfinite)
    return sorted(found)


def _entries(snapshot: Snapshot, reports: list[dict[str, Any]], incremental: bool) -> dict[str, Entry]:
    chunks: dict[str, list[Chunk]] = {}
    updates: dict[str, list[Update]] = {}
    dropped: dict[str, list[Block]] = {}
    told: dict[str, dict[str, Any]] = {}
    for report in reports:
        for part in report["parts"]:
            told.setdefault(part["key"], part)
            columns = range(*part["columns"])
            blocks = [Block(report["file"], start, size, rows, tuple(hashes)) for start, size, rows, hashes in part["blocks"]]
            dropped.setdefault(part["key"], []).extend(blocks[2:])
            if len(blocks) == 1:
                chunks.setdefault(part["key"], []).append(Chunk(range(*part["rows"]), columns, blocks[0]))
            else:
                buckets = None if part["living"] is None else range(*part["rows"])
                updates.setdefault(part["key"], []).append(Update(columns, blocks[0], blocks[1], buckets))
    known = {
        item.key: Entry(item.key, item.kind, item.of, _shape(item, reports), item.dtype, by_id=_by_id(item, incremental))
        for item in snapshot.items.values()
    }
    for key, part in told.items():  # rank 0 may hold nothing of a tensor, not even know of it
        if key not in known:
            known[key] = Entry(key, part["kind"], part["of"], tuple(part["shape"]), getattr(torch, part["dtype"]))
    return {
        key: replace(
            entry,
            chunks=tuple(sorted(chunks.get(key, []), key=lambda chunk: (chunk.columns.start, chunk.rows.start))),
            updates=tuple(sorted(updates.get(key, []), key=lambda each: (each.columns.start, each.ids.file, each.ids.offset))),
            dropped=tuple(dropped.get(key, [])),
        )
        for key, entry in known.items()
    }


def _by_id(item: Item, incremental: bool) -> ById | None:
    return None if item.by_id is None else replace(item.by_id, whole=not (incremental and changes(item)))


def _shape(item: Item, reports: list[dict[str, Any]]) -> tuple[int, ...]:
    """Of a dynamic table with as many rows as ids have one, counted in its first columns."""
    if item.by_id is None:
        return item.shape
    parts = [part for report in reports for part in report["parts"] if part["key"] == item.key and not part["columns"][0]]
    return sum(part["living"] for part in parts), *item.shape[1:]


def _remove(saving: Path) -> str:
    with suppress(OSError):  # the next save tries again
        folders.remove(saving)
    return ""


def _clean(root: Path, keep: int | None, written: str) -> None:
    name = folders.Named.of(written)
    assert name is not None
    stay = retention.kept(root, name, keep)
    for one in folders.listed(root):
        if one not in stay:
            _remove(root / str(one))
