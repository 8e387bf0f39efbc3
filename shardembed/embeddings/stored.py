"""Tables of a checkpoint as a stream of blocks of rows: no model, no process group, and never more of a table than one block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from shardembed.checkpoint.filling import Cut, Rows, Wanted, check_files, check_met, fill, ids_of
from shardembed.checkpoint.format.blocks import Entry, Update
from shardembed.checkpoint.format.manifest import Manifest, Source, read_manifest, resolve
from shardembed.checkpoint.format.pieces import Files, read_ids, read_state
from shardembed.checkpoint.format.strict import loads
from shardembed.checkpoint.selection import IdMap, Placed, Selection
from shardembed.config.hints import nearest
from shardembed.embeddings.compared import UNKNOWN, Metric, Vectors, Which, check_which, in_words, read_noted, tower_of
from shardembed.embeddings.of_run import checkpoint_of
from shardembed.errors import CheckpointError, ConfigError, IdRangeError

BLOCK_BYTES = ROW_BYTES = 64 << 20
SHOWN = 10
SUFFIX = ".weight"


@dataclass(frozen=True)
class Block:
    """Some rows of a table; overwritten by the next block.

    Attributes:
        first: how many rows came before.
        ids: which rows of the table these are, int64 `[n]`.
        values: the rows, `[n, columns]`.
    """

    first: int
    ids: torch.Tensor
    values: torch.Tensor


class StoredTables(AbstractContextManager["StoredTables"]):
    """The tables of a checkpoint; use it in a `with`.

    Args:
        folder: of checkpoints (the newest counts), of one checkpoint, or of a run of `shardembed train` (its best weights, or while
            it is not finished the newest).
        step: the checkpoint of this step.
        vectors: "rows" as they lie in the tables, or those that the "model" compares (see `compared`); None gives the latter where
            the checkpoint says what they are.

    Raises:
        CheckpointError: there is no such checkpoint, or its manifest is damaged.
    """

    def __init__(self, folder: str | Path, step: int | None = None, vectors: Which | None = "rows") -> None:
        check_which(vectors)
        self.path = checkpoint_of(Path(folder), step)
        self.manifest: Manifest = read_manifest(self.path)
        if step is not None and self.manifest.step != step:
            raise CheckpointError(f"{self.path} is the checkpoint of step {self.manifest.step}, and not of step {step}")
        self._manifests, self._sources = resolve(self.manifest, self.path)
        self._files: dict[Path, Files] = {}
        self._stack = ExitStack()
        self._wanted: Which | None = vectors

    def __enter__(self) -> StoredTables:
        self._files = {folder: self._stack.enter_context(Files(folder, found)) for folder, found in self._manifests.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    @property
    def names(self) -> list[str]:
        """What the tables are called: their keys in the checkpoint without `.weight`."""
        return [name_of(key) for key, source in self._sources.items() if source.entry.kind == "table"]

    @cached_property
    def _compared(self) -> dict[str, Vectors]:
        where = str(self.path / "state.json")
        return read_noted(loads(read_state(self._files[self.path]), where, floats=True), where)

    def find(self, name: str) -> StoredTable:
        """The table of this key, of this path of a module, or whose path ends in this name; also a dense matrix, by its key.

        Raises:
            ConfigError: there is none, or several end so, or its rows are longer than an embedding's, or the checkpoint does not
                say what its model compares.
            CheckpointError: its files are not as long as the manifest says.
        """
        return self.as_compared(self._found(name), self._wanted)

    def as_compared(self, table: StoredTable, vectors: Which | None) -> StoredTable:
        """A table that was found as rows, as `vectors` says it (see `StoredTables`).

        Raises:
            ConfigError: the checkpoint does not say what its model compares. CheckpointError: its tower does not fit.
        """
        if vectors == "rows" or (vectors is None and table.compared is None):
            return table
        if table.compared is None:
            raise ConfigError(f"table {table.name!r} of {self.path}: {UNKNOWN}, so there are only its rows: leave out 'model'")
        if table.compared.features:
            raise ConfigError(
                f"table {table.name!r} of {self.path}: the model adds vectors of features to its rows, which data say and no "
                f"checkpoint: {', '.join(table.compared.features[:SHOWN])}. Export its vectors from the run of `shardembed train`, "
                "or ask for rows: --vectors rows, from Python vectors='rows'"
            )
        return _ModelVectors(table, tower_of(self.path, table.compared, table.columns))

    def _found(self, name: str) -> StoredTable:
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
        return StoredTable(name_of(found[0]), source, self._files, self._compared.get(name_of(found[0])))


class StoredTable:
    """One table, whose rows are read as they are asked for. Made by `StoredTables.find`. Of a dynamic table its ids are in memory.

    Attributes:
        compared: how the model compares its rows; None where the checkpoint does not say.
        vectors: what its rows are here: "rows" of the table, or vectors of the "model".
    """

    vectors: Which = "rows"

    def __init__(self, name: str, source: Source, files: dict[Path, Files], compared: Vectors | None) -> None:
        self.name, self.key, self.compared = name, source.entry.key, compared
        self.rows, self.columns, self.dtype = source.entry.rows, source.entry.columns, source.entry.dtype
        self._source, self._files = source, files
        self._ids = ids_of(source, files) if source.entry.by_id is not None else None
        if self._ids is not None and len(self._ids) != self.rows:
            raise CheckpointError(f"table {name!r}: the checkpoint has {len(self._ids):,} of its {self.rows:,} ids")
        self._read_before: dict[Update, list[tuple[int, torch.Tensor]]] = {}

    @property
    def metric(self) -> Metric | None:
        """By which the model compares what is read here; None where it does not compare that, or is not known to."""
        return self.compared.metric if self.compared is not None and self.compared.are_rows else None

    @property
    def told(self) -> str:
        """What is read here, in words."""
        if self.metric is not None:
            return in_words(self.metric)
        if self.compared is None:
            return f"rows as they lie in the table; {UNKNOWN}"
        return f"rows as they lie in the table; the model compares other vectors, which it makes of them ({self.compared.made})"

    def blocks(self, ids: torch.Tensor | None = None, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
        """All rows in the order of ids, or those of `ids` (as `chosen` gives them), a block after the other.

        A block takes `block_bytes` at most, or one row where that is more, and reading it 16 MiB beside it. What is read is
        compared with its hash in whole pieces of up to 8 MiB, which a block may need a part of: pieces at its edges are read twice.

        Raises:
            CheckpointError: something that was read is damaged; file, table and rows are named.
        """
        ids = self._ids if ids is None else ids
        rows_a_block = max(1, block_bytes // (self.columns * self.dtype.itemsize))
        total = self.rows if ids is None else len(ids)
        # One buffer for all blocks: a table of a terabyte must not leave garbage of its size to be collected.
        room = torch.empty(min(rows_a_block, total), self.columns, dtype=self.dtype)
        for first in range(0, total, rows_a_block):
            part = range(first, min(first + rows_a_block, total))
            if ids is None:
                wanted, numbers = Cut(part), torch.arange(part.start, part.stop)
            else:
                numbers = ids[part.start : part.stop]
                wanted = self._selection(numbers)
            yield Block(first, numbers, self._read(wanted, room[: len(part)]))

    def some(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids`, which are distinct, in their order."""
        into = torch.empty(len(ids), self.columns, dtype=self.dtype)
        return self._read(self._selection(ids), into)

    def _selection(self, ids: torch.Tensor) -> Rows:
        found = IdMap(self.name, ids)
        return Selection(self.rows, found) if self._ids is None else Placed(*found.ascending)

    @property
    def ids(self) -> torch.Tensor | None:
        """Of a dynamic table, the ids that have a row, int64, ascending; None: they are 0 to `rows` - 1."""
        return self._ids

    def chosen(self, ids: Any) -> torch.Tensor:
        """`ids` as int64, ascending, each once.

        Raises:
            IdRangeError: an id is no row of the table, or has none.
            ConfigError: they are not a list of whole numbers.
        """
        found = torch.as_tensor(ids)
        if found.dim() != 1 or (len(found) and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)):
            raise ConfigError(f"rows of table {self.name!r} must be a list of ids, not {found.dtype} of shape {tuple(found.shape)}")
        found = found.to("cpu", torch.int64)
        wrong = ((found < 0) | (found >= self.rows) if self._ids is None else ~torch.isin(found, self._ids)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            there = f"its ids are 0 to {self.rows - 1}" if self._ids is None else f"it is none of the {self.rows:,} that have a row"
            raise IdRangeError(f"table {self.name!r}: id {int(found[place])} at position {place}; {there}")
        return found.unique()

    def _read(self, rows: Rows, into: torch.Tensor) -> torch.Tensor:
        wanted = Wanted(self.key, self._source, rows, range(self.columns), into)
        fill([wanted], self._files, self._read_ids)
        check_met(wanted)
        return into

    def _read_ids(self, files: Files, entry: Entry, update: Update) -> list[tuple[int, torch.Tensor]]:
        """Those of dynamic tables are kept, since each block asks for them: 8 bytes a row, as `ids` take."""
        if entry.by_id is None:
            return list(read_ids(files, entry, update))
        if update not in self._read_before:
            self._read_before[update] = list(read_ids(files, entry, update))
        return self._read_before[update]


class _ModelVectors(StoredTable):
    """What a model makes of the rows of a table, in float32."""

    vectors = "model"

    def __init__(self, table: StoredTable, tower: nn.Module | None) -> None:
        assert table.compared is not None
        super().__init__(table.name, table._source, table._files, table.compared)
        self._made, self._tower, self._stored = table.compared, tower, self.dtype
        self.dtype = torch.float32

    @property
    def metric(self) -> Metric | None:
        return self._made.metric

    @torch.no_grad()
    def _read(self, rows: Rows, into: torch.Tensor) -> torch.Tensor:
        return into.copy_(self._made.of(super()._read(rows, torch.empty(into.shape, dtype=self._stored)), self._tower))


def name_of(key: str) -> str:
    return key.removesuffix(SUFFIX)


def _is_matrix(entry: Entry) -> bool:
    return entry.kind == "dense" and len(entry.shape) == 2 and entry.dtype.is_floating_point
