"""What a checkpoint holds, in numbers: for people (`cli.inspect`) and for scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.format.checks import blocks_of
from shardembed.checkpoint.format.manifest import Manifest
from shardembed.errors import PlanError
from shardembed.tables.plan import Plan


@dataclass(frozen=True)
class Table:
    """A table of a checkpoint.

    Attributes:
        key: in the state dict of the unsharded model.
        shape: rows and columns; of a dynamic table as many rows as ids have one.
        dynamic: its rows go by id.
        capacity: of a dynamic table, how many ids may have a row; None: any number, or it is not dynamic.
        candidates: of a dynamic table, how many ids are counted and have no row.
        dropped_ids: of a dynamic table, ids that have lost their rows since the checkpoint below.
        dtype: of the rows.
        bytes: that all rows take.
        stored_bytes: of these, what lies in this folder.
        chunks: that the rows are cut into; 0 in an increment.
        updated_rows: rows that an incremental checkpoint has anew.
        files: that hold any of it.
        state: names of its optimizer state.
        state_bytes: that this state takes, and what is kept of ids.
    """

    key: str
    shape: tuple[int, ...]
    dynamic: bool
    capacity: int | None
    candidates: int
    dropped_ids: int
    dtype: str
    bytes: int
    stored_bytes: int
    chunks: int
    updated_rows: int
    files: int
    state: tuple[str, ...]
    state_bytes: int


@dataclass(frozen=True)
class Contents:
    """All of one checkpoint.

    Attributes:
        path: its folder.
        manifest: what it says it holds.
        tables: those that were sharded.
        dense: how many other tensors there are.
        dense_bytes: that these take.
        dense_state_bytes: that the state of their optimizer takes.
        plans: of each collection of tables, or why it cannot be read.
    """

    path: Path
    manifest: Manifest
    tables: tuple[Table, ...]
    dense: int
    dense_bytes: int
    dense_state_bytes: int
    plans: tuple[Plan | str, ...]

    @property
    def stored_bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files.values())

    def as_json(self) -> dict[str, Any]:
        manifest = self.manifest
        return {
            "path": str(self.path),
            "step": manifest.step,
            "created": manifest.created,
            "world_size": manifest.world_size,
            "versions": dict(manifest.versions),
            "base": None if manifest.base is None else manifest.base.folder,
            "previous": manifest.previous,
            "nonfinite": list(manifest.nonfinite),
            "stored_bytes": self.stored_bytes,
            "files": {name: file.bytes for name, file in manifest.files.items()},
            "tables": {table.key: {**asdict(table), "key": table.key} for table in self.tables},
            "dense_tensors": self.dense,
            "dense_bytes": self.dense_bytes,
            "dense_state_bytes": self.dense_state_bytes,
            "plans": [plan.to_json() if isinstance(plan, Plan) else None for plan in self.plans],
        }


def contents(path: Path, manifest: Manifest) -> Contents:
    entries = list(manifest.entries.values())
    state: dict[str, list[Entry]] = {}
    for entry in entries:
        if entry.kind in ("table_state", "table_ids"):
            state.setdefault(entry.of, []).append(entry)
    dense = [entry for entry in entries if entry.kind == "dense"]
    return Contents(
        path,
        manifest,
        tuple(_table(entry, state.get(entry.key, [])) for entry in entries if entry.kind == "table"),
        len(dense),
        sum(entry.nbytes for entry in dense),
        sum(entry.nbytes for entry in entries if entry.kind == "dense_state"),
        tuple(_plan(data) for data in manifest.plans),
    )


def _table(entry: Entry, state: list[Entry]) -> Table:
    blocks, by_id = blocks_of(entry), entry.by_id
    whole = by_id is not None and by_id.whole
    return Table(
        entry.key,
        entry.shape,
        by_id is not None,
        None if by_id is None else by_id.capacity,
        sum(each.rows for each in state if each.key == f"{entry.key}.candidates.last"),
        sum(block.bytes for block in entry.dropped) // torch.int64.itemsize,
        str(entry.dtype).removeprefix("torch."),
        entry.nbytes,
        sum(block.bytes for block in blocks),
        len(entry.updates if whole else entry.chunks),
        0 if whole else _updated_rows(entry),
        len({block.file for block in blocks}),
        tuple(each.key.removeprefix(f"{entry.key}.") for each in state if each.kind == "table_state"),
        sum(each.nbytes for each in state),
    )


def _updated_rows(entry: Entry) -> int:
    """Of the columns that most rows were updated of: a row of several strips is one row."""
    rows: dict[range, int] = {}
    for update in entry.updates:
        rows[update.columns] = rows.get(update.columns, 0) + update.ids.bytes // torch.int64.itemsize
    return max(rows.values(), default=0)


def _plan(data: dict[str, Any]) -> Plan | str:
    try:
        return Plan.from_json(data)
    except PlanError as error:
        return str(error)
