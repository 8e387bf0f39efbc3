"""Tensors from the entries of a checkpoint: which rows and columns of which chunk go where, then the rows that changed since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from shardembed.checkpoint.format.blocks import Update
from shardembed.checkpoint.format.manifest import Source
from shardembed.checkpoint.format.pieces import Copy, Files, read_ids, run_copies
from shardembed.checkpoint.format.regions import common

Places = slice | torch.Tensor


class Rows(Protocol):
    """Which rows of a table are wanted, and where each goes."""

    def of_chunk(self, rows: range) -> tuple[range | torch.Tensor, Places]:
        """Positions in `rows` that are wanted, and the place of each."""
        ...

    def of_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in `ids`, ascending row numbers, that are wanted, and the place of each."""
        ...


@dataclass(frozen=True)
class Cut:
    """The rows of a shard, in their order.

    Attributes:
        rows: of the table.
    """

    rows: range

    def of_chunk(self, rows: range) -> tuple[range, slice]:
        mine, theirs = common(self.rows, rows) or (range(0), range(0))
        return theirs, slice(mine.start, mine.stop, mine.step)

    def of_ids(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, stop, step = self.rows.start, self.rows.stop, self.rows.step
        positions = torch.nonzero((ids >= first) & (ids < stop) & ((ids - first) % step == 0)).squeeze(1)
        return positions, (ids[positions] - first) // step


@dataclass(frozen=True)
class Wanted:
    """Some rows and columns of an entry, and where they go.

    Attributes:
        key: of the entry.
        source: where its values come from.
        rows: which rows, and the place of each.
        columns: which columns.
        into: `[places, len(columns)]`, of any strides.
    """

    key: str
    source: Source
    rows: Rows
    columns: range
    into: torch.Tensor


def fill(wanted: Sequence[Wanted], files: Mapping[Path, Files]) -> None:
    """Read all that is wanted; each piece of a chunk once, whoever wants it.

    Raises:
        CheckpointError: something that was read is damaged; files, tensor and rows are named.
    """
    # All in one list, so that a piece which several tensors need a part of is read and hashed once.
    run_copies([copy for one in wanted for copy in _of_chunks(one, files[one.source.chunks_in])])
    for one in wanted:  # after all chunks: these are newer
        for folder, updates in one.source.layers:
            for update in updates:
                _apply(one, update, files[folder])


def check_files(sources: Iterable[Source], files: Mapping[Path, Files]) -> None:
    """Open each file that these lie in, which compares its size and its header with the manifest: before memory is asked for.

    Raises:
        CheckpointError: a file is missing, of another size, or says something else than the manifest.
    """
    names = {(source.chunks_in, chunk.block.file) for source in sources for chunk in source.chunks}
    names |= {
        (folder, block.file)
        for source in sources
        for folder, updates in source.layers
        for update in updates
        for block in (update.ids, update.values)
    }
    for folder, name in sorted(names):
        with files[folder].opened(name):
            pass


def _of_chunks(wanted: Wanted, files: Files) -> Iterator[Copy]:
    for chunk in wanted.source.chunks:
        columns = _shared(wanted.columns, chunk.columns)
        if columns is None or not chunk.block.bytes:
            continue
        mine, theirs = columns
        rows, places = wanted.rows.of_chunk(chunk.rows)
        stored = chunk.block, wanted.source.entry.dtype, len(chunk.columns)
        yield Copy(files, *stored, rows, theirs, wanted.into[:, mine], places, wanted.key)


def _apply(wanted: Wanted, update: Update, files: Files) -> None:
    entry, columns = wanted.source.entry, _shared(wanted.columns, update.columns)
    if columns is None:
        return
    mine, theirs = columns
    for first, ids in read_ids(files, entry, update):
        rows, places = wanted.rows.of_ids(ids)
        stored = update.values, entry.dtype, len(update.columns)
        run_copies([Copy(files, *stored, first + rows, theirs, wanted.into[:, mine], places, wanted.key)])


def _shared(mine: range, theirs: range) -> tuple[slice, slice] | None:
    """The columns that are in both, as counted in each; None where there are none."""
    first, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
    if first >= stop:
        return None
    return slice(first - mine.start, stop - mine.start), slice(first - theirs.start, stop - theirs.start)
