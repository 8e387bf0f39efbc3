"""Tables of a checkpoint as a stream of blocks of rows: no model, no process group, and never more of a table than one block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from shardembed.checkpoint import folders
from shardembed.checkpoint.filling import Cut, Rows, Wanted, check_files, fill
from shardembed.checkpoint.format.blocks import Entry
from shardembed.checkpoint.format.manifest import Manifest, Source, read_manifest, resolve
from shardembed.checkpoint.format.pieces import Files
from shardembed.checkpoint.selection import IdMap, Selection
from shardembed.errors import CheckpointError, ConfigError, IdRangeError
from shardembed.explain import nearest

BLOCK_BYTES = ROW_BYTES = 64 << 20
IN_RUN = "checkpoints"  # where a run of `shardembed train` keeps them
SHOWN = 10
SUFFIX = ".weight"


@dataclass(frozen=True)
class Block:
    """Some rows: `ids[i]` is the row of the table that `values[i]` is. `values` is overwritten by the next block."""

    first: int  # how many rows came before
    ids: torch.Tensor
    values: torch.Tensor


class StoredTables(AbstractContextManager["StoredTables"]):
    """The tables of a checkpoint; use it in a `with`.

    Args:
        folder: of checkpoints (the newest counts), of one checkpoint, or of a run of `shardembed train`.
        step: the checkpoint of this step, rather than the newest.

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest is damaged.
    """

    def __init__(self, folder: str | Path, step: int | None = None) -> None:
        self.path = folders.chosen(_of_run(Path(folder)), step)
        self.manifest: Manifest = read_manifest(self.path)
        if step is not None and self.manifest.step != step:
            raise CheckpointError(f"{self.path} is the checkpoint of step {self.manifest.step}, and not of step {step}")
        self._manifests, self._sources = resolve(self.manifest, self.path)
        self._files: dict[Path, Files] = {}
        self._stack = ExitStack()

    def __enter__(self) -> StoredTables:
        self._files = {folder: self._stack.enter_context(Files(folder, found)) for folder, found in self._manifests.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """What the tables are called: their keys in the checkpoint without `.weight`."""
        return [name_of(key) for key, source in self._sources.items() if source.entry.kind == "table"]

    def find(self, name: str) -> StoredTable:
        """The table of this key, of this path of a module, or whose path ends in this name; also a dense matrix, by its key.

        Raises:
            ConfigError: there is none, or several end so; or its rows are longer than an embedding's.
            CheckpointError: its files are not as long as the manifest says.
        """
        tables = [key for key, source in self._sources.items() if source.entry.kind == "table"]
        exact = [key for key in tables if name in (key, name_of(key))]
        ends = [key for key in tables if name_of(key).endswith(f".{name}")]
        matrices = [key for key, source in self._sources.items() if name in (key, name_of(key)) and _is_matrix(source.entry)]
        found = exact or ends or matrices
        if len(found) > 1 and not exact:
            several = ", ".join(name_of(key) for key in found[:SHOWN])
            raise ConfigError(f"table {name!r}: {self.path} has {several}; give the whole name")
        if not found:
            known = [name_of(key) for key in tables]
            more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
            there = f"it has {', '.join(known[:SHOWN])}{more}" if known else "it has no tables"
            close = nearest(name, [*known, *(each.rpartition(".")[2] for each in known)])
            raise ConfigError(f"table {name!r} is not in {self.path}{close}; {there}")
        source = self._sources[found[0]]
        if not source.entry.columns:
            raise ConfigError(f"table {name!r} of {self.path} has no columns")
        if source.entry.columns * source.entry.dtype.itemsize > ROW_BYTES:
            raise ConfigError(
                f"table {name!r} of {self.path} has {source.entry.columns:,} columns, and rows of more than {ROW_BYTES:,} bytes "
                "are no embeddings"
            )
        check_files([source], self._files)
        return StoredTable(name_of(found[0]), source, self._files)


class StoredTable:
    """One table, whose rows are read as they are asked for. Made by `StoredTables.find`."""

    def __init__(self, name: str, source: Source, files: dict[Path, Files]) -> None:
        self.name, self.key = name, source.entry.key
        self.rows, self.columns, self.dtype = source.entry.rows, source.entry.columns, source.entry.dtype
        self._source, self._files = source, files

    def blocks(self, ids: torch.Tensor | None = None, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """All rows in their order, or those of `ids` (as `chosen` gives them), a block after the other.

        A block takes `block_bytes` at most, or one row where that is more, and reading it 16 MiB beside it. What is read is
        compared with its hash in whole pieces of up to 8 MiB, which a block may need a part of: pieces at its edges are read twice.

        Raises:
            CheckpointError: something that was read is damaged; file, table and rows are named.
        """
        rows_a_block = max(1, block_bytes // (self.columns * self.dtype.itemsize))
        total = self.rows if ids is None else len(ids)
        room = torch.empty(min(rows_a_block, total), self.columns, dtype=self.dtype)
        for first in range(0, total, rows_a_block):
            part = range(first, min(first + rows_a_block, total))
            if ids is None:
                wanted, numbers = Cut(part), torch.arange(part.start, part.stop)
            else:
                numbers = ids[part.start : part.stop]
                wanted = Selection(self.rows, IdMap(self.name, numbers))
            yield Block(first, numbers, self._read(wanted, room[: len(part)]))

    def some(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids`, which are distinct, in their order."""
        into = torch.empty(len(ids), self.columns, dtype=self.dtype)
        return self._read(Selection(self.rows, IdMap(self.name, ids)), into)

    def chosen(self, ids: Any) -> torch.Tensor:
        """`ids` as int64, ascending, each once.

        Raises:
            IdRangeError: an id is no row of the table.
            ConfigError: they are not a list of whole numbers.
        """
        found = torch.as_tensor(ids)
        if found.dim() != 1 or (len(found) and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)):
            raise ConfigError(f"rows of table {self.name!r} must be a list of ids, not {found.dtype} of shape {tuple(found.shape)}")
        found = found.to("cpu", torch.int64)
        wrong = ((found < 0) | (found >= self.rows)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise IdRangeError(f"table {self.name!r}: id {int(found[place])} at position {place}; its ids are 0 to {self.rows - 1}")
        return found.unique()

    def _read(self, rows: Rows, into: torch.Tensor) -> torch.Tensor:
        fill([Wanted(self.key, self._source, rows, range(self.columns), into)], self._files)
        return into


def name_of(key: str) -> str:
    return key.removesuffix(SUFFIX)


def _is_matrix(entry: Entry) -> bool:
    return entry.kind == "dense" and len(entry.shape) == 2 and entry.dtype.is_floating_point


def _of_run(folder: Path) -> Path:
    inside = folder / IN_RUN
    return inside if inside.is_dir() and not (folder / folders.MANIFEST).exists() and not folders.listed(folder) else folder
