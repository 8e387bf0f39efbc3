"""Rows from a checkpoint into tensors: decided as data (`Copy`), then run piece by piece, each read once for all that need it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shardembed.checkpoint.format.blocks import Block
from shardembed.checkpoint.format.files import Files
from shardembed.checkpoint.format.reading import piece_of
from shardembed.checkpoint.format.workers import Scratch, spread

Rows = range | torch.Tensor
Task = tuple["_Group", int, list[tuple["_Wanted", int, int]]]


@dataclass(frozen=True)
class Copy:
    """Some rows and columns of a block, into some rows of a tensor of as many columns.

    Attributes:
        files: the open checkpoint that has the block.
        block: rows of `columns` elements, one after the other.
        dtype: of these, as stored.
        columns: of a stored row.
        source_rows: which rows, by position in the block. A tensor of positions may be in any order.
        source_columns: which of their columns.
        into: a two-dimensional view with any strides, dtype and device.
        into_rows: the row of it that each one goes to.
        key: of the tensor, for errors.
    """

    files: Files
    block: Block
    dtype: torch.dtype
    columns: int
    source_rows: Rows
    source_columns: slice
    into: torch.Tensor
    into_rows: slice | torch.Tensor
    key: str

    def __post_init__(self) -> None:
        rows, targets = self.rows, self.targets
        columns = len(range(*self.source_columns.indices(self.columns)))
        fits = len(self.source_rows) == len(targets) and columns == self.into.shape[1]
        if not fits or not _inside(self.source_rows, rows) or not _inside(targets, len(self.into)):
            raise ValueError(
                f"{self.key!r}: {len(self.source_rows)} of {rows} x {self.columns} (columns {self.source_columns}) do not go into "
                f"{len(targets)} rows of a tensor of {tuple(self.into.shape)}"
            )

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def rows(self) -> int:
        return self.block.bytes // self.row_bytes if self.row_bytes else 0

    @property
    def targets(self) -> Rows:
        if isinstance(self.into_rows, torch.Tensor):
            return self.into_rows
        return range(*self.into_rows.indices(len(self.into)))


def run_copies(copies: Sequence[Copy], workers: int = 2) -> None:
    """Run all `copies`. Only pieces that are needed are read, and each is compared with its hash before any of it is copied.

    Needs the memory of one piece a worker.

    Raises:
        CheckpointError: a piece is damaged or a file altered; some copies may have been made by then.
    """
    spread(_tasks(copies), _run, workers)


class _Group:
    """The copies from one block."""

    def __init__(self, copy: Copy) -> None:
        self.first = copy
        self.wanted: list[_Wanted] = []


class _Wanted:
    """One copy with its source positions ascending, so that those of a piece are neighbours."""

    def __init__(self, copy: Copy) -> None:
        self.copy = copy
        self.positions, self.targets = copy.source_rows, copy.targets
        if isinstance(self.positions, torch.Tensor) and not bool((self.positions[1:] >= self.positions[:-1]).all()):
            self.positions, order = self.positions.sort(stable=True)
            self.targets = _as_tensor(self.targets)[order]

    def pieces(self, rows_a_piece: int) -> Iterator[tuple[int, int, int]]:
        """(piece, first, stop): which of the positions lie in each piece that has some."""
        if isinstance(self.positions, torch.Tensor):
            pieces, counts = torch.unique_consecutive(self.positions // rows_a_piece, return_counts=True)
            stops = counts.cumsum(0)
            yield from zip(pieces.tolist(), (stops - counts).tolist(), stops.tolist(), strict=True)
            return
        positions, first = self.positions, 0
        while first < len(positions):
            piece = positions[first] // rows_a_piece
            stop = min(len(positions), -(-((piece + 1) * rows_a_piece - positions.start) // positions.step))
            yield piece, first, stop
            first = stop


def _tasks(copies: Sequence[Copy]) -> Iterator[Task]:
    """The pieces to read, in the order in which they lie in their files."""
    groups: dict[tuple[int, str, int, torch.dtype, int], _Group] = {}
    for copy in copies:
        # What wants nothing reads nothing, or a rank would hash pieces in vain.
        if len(copy.source_rows) and copy.into.numel():
            key = (id(copy.files), copy.block.file, copy.block.offset, copy.dtype, copy.columns)
            groups.setdefault(key, _Group(copy)).wanted.append(_Wanted(copy))
    for key in sorted(groups, key=lambda key: key[:3]):
        group = groups.pop(key)  # positions are let go as soon as they are used
        pieces: dict[int, list[tuple[_Wanted, int, int]]] = {}
        for wanted in group.wanted:
            for piece, first, stop in wanted.pieces(group.first.block.rows_a_piece):
                pieces.setdefault(piece, []).append((wanted, first, stop))
        for piece in sorted(pieces):
            yield group, piece, pieces.pop(piece)


def _run(task: Task, scratch: Scratch) -> None:
    group, piece, parts = task
    copy = group.first
    data = piece_of(copy.files, copy.block, copy.row_bytes, piece, scratch)
    # A file can hold a boolean that is neither 0 nor 1, which no tensor may.
    values = data.ne(0) if copy.dtype == torch.bool else data.view(copy.dtype)
    rows = values.view(-1, copy.columns)
    for wanted, first, stop in parts:
        into = wanted.copy.into.detach()
        found = rows[_index(wanted.positions, first, stop, piece * copy.block.rows_a_piece)][:, wanted.copy.source_columns]
        targets = _index(wanted.targets, first, stop, 0)
        if isinstance(targets, slice):
            into[targets].copy_(found)
        else:
            into[targets] = found.to(into.device, into.dtype)


def _index(rows: Rows, first: int, stop: int, origin: int) -> slice | torch.Tensor:
    """`rows[first:stop] - origin`, as an index; a slice makes a view and not a copy."""
    if isinstance(rows, torch.Tensor):
        return rows[first:stop] - origin if origin else rows[first:stop]
    part = rows[first:stop]
    return slice(part[0] - origin, part[-1] - origin + 1, part.step)


def _inside(rows: Rows, total: int) -> bool:
    if not len(rows):
        return True
    if isinstance(rows, torch.Tensor):
        return bool(rows.min() >= 0) and bool(rows.max() < total)
    return rows.step > 0 and rows[0] >= 0 and rows[-1] < total


def _as_tensor(rows: Rows) -> torch.Tensor:
    return rows if isinstance(rows, torch.Tensor) else torch.arange(rows.start, rows.stop, rows.step)
