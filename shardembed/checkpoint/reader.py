"""A checkpoint that is being read: its manifest, its small state, and copies of rows into the tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shardembed.checkpoint import small
from shardembed.checkpoint.format.blocks import Chunk, Update
from shardembed.checkpoint.format.manifest import Source, read_manifest, resolve
from shardembed.checkpoint.format.pieces import Copy, Files, read_ids, read_state, run_copies
from shardembed.checkpoint.format.regions import common
from shardembed.checkpoint.format.strict import loads
from shardembed.checkpoint.inventory import Item, Region

Rows = slice | torch.Tensor


class Reader:
    """The checkpoint in a folder; use it in a `with`.

    Raises:
        CheckpointError: the manifest is missing, damaged, of a newer format, or stands on a full checkpoint that is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._manifests, self.sources = resolve(self.manifest, path)
        self._files: dict[Path, Files] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        self._files = {folder: self._stack.enter_context(Files(folder, found)) for folder, found in self._manifests.items()}
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @cached_property
    def small(self) -> dict[str, Any]:
        """The small state, checked (see `small`)."""
        where = str(self.path / "state.json")
        return small.checked(loads(read_state(self._files[self.path]), where, floats=True), where)

    def copy(self, wanted: Sequence[tuple[Item, str]]) -> None:
        """Fill the regions of each item from the entry of this key, as far as the entry's rows go.

        Raises:
            CheckpointError: something that was read is damaged; files, tensor and rows are named.
        """
        run_copies([copy for item, key in wanted for copy in self._of_chunks(item, self.sources[key])])
        for item, key in wanted:  # after all chunks: these are newer
            source = self.sources[key]
            for update in source.updates:
                self._apply(item, source, update)
        for item, _ in wanted:
            for region in item.regions:
                region.come_home()

    def _of_chunks(self, item: Item, source: Source) -> Iterator[Copy]:
        files = self._files[source.chunks_in]
        for chunk in source.chunks:
            for region in item.regions:
                met = _meet(region, chunk)
                if met is None:
                    continue
                mine, theirs, columns = met
                block, into = chunk.block, region.data[:, columns[0]]
                yield Copy(files, block, item.dtype, len(chunk.columns), theirs, columns[1], into, mine, item.key)

    def _apply(self, item: Item, source: Source, update: Update) -> None:
        files = self._files[source.updates_in]
        for first, ids in read_ids(files, source.entry, update):
            copies = []
            for region in item.regions:
                columns = _columns(region.columns, update.columns)
                inside = (ids >= region.rows.start) & (ids < region.rows.stop) & ((ids - region.rows.start) % region.rows.step == 0)
                places = torch.nonzero(inside).squeeze(1)
                if columns is None or not len(places):
                    continue
                rows = (ids[places] - region.rows.start) // region.rows.step
                into = region.data[:, columns[0]]
                values, width = update.values, len(update.columns)
                copies.append(Copy(files, values, item.dtype, width, first + places, columns[1], into, rows, item.key))
            run_copies(copies)


def _meet(region: Region, chunk: Chunk) -> tuple[slice, range, tuple[slice, slice]] | None:
    """(rows of the region, rows of the chunk, columns of each) that are the same elements of the tensor; None if none are."""
    rows, columns = common(region.rows, chunk.rows), _columns(region.columns, chunk.columns)
    if rows is None or columns is None:
        return None
    mine, theirs = rows
    return slice(mine.start, mine.stop, mine.step), theirs, columns


def _columns(mine: range, theirs: range) -> tuple[slice, slice] | None:
    first, stop = max(mine.start, theirs.start), min(mine.stop, theirs.stop)
    if first >= stop:
        return None
    return slice(first - mine.start, stop - mine.start), slice(first - theirs.start, stop - theirs.start)
