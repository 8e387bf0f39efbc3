"""The open files of one checkpoint, each checked against the manifest when it is first opened: kind, size and header."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch

from shardembed.checkpoint.format import header
from shardembed.checkpoint.format.blocks import CODES, Block, Entry, chunk_name
from shardembed.checkpoint.format.checks import STATE, blocks_of
from shardembed.checkpoint.format.manifest import Manifest
from shardembed.checkpoint.format.strict import folder_opened, open_regular, refuse_pickle
from shardembed.errors import CheckpointError

MOST_OPEN = 200  # a checkpoint of thousands of ranks has more files than a process may open


@dataclass(frozen=True, slots=True)
class Place:
    """What a block is part of.

    Attributes:
        entry: the tensor.
        rows: of the tensor; None where the file says which, as in updates.
        columns: of the tensor.
    """

    entry: Entry
    rows: range | None
    columns: range

    def text(self, first: int, stop: int) -> str:
        """Rows from the `first` up to `stop` of the block, for messages."""
        which = "updated rows" if self.rows is None else "rows"
        rows = range(first, stop) if self.rows is None else self.rows[first:stop]
        every = f" in steps of {rows.step}" if rows.step > 1 else ""
        part = f", columns {self.columns.start} to {self.columns.stop - 1}"
        return (
            f"{which} {rows[0]} to {rows[-1]}{every}{part if len(self.columns) < self.entry.columns else ''} of {self.entry.key!r}"
        )


class Files(AbstractContextManager["Files"]):
    """The files of the checkpoint in `folder`. Threads may share it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._lock = threading.Lock()
        self._open: dict[str, int] = {}  # name -> descriptor, the one used longest ago first
        self._used: dict[str, int] = {}  # name -> by how many threads right now
        self._checked: set[str] = set()
        self._folder: int | None = None
        self._closing: AbstractContextManager[int] | None = None

    def __enter__(self) -> Files:
        self._closing = folder_opened(self.folder)
        self._folder = self._closing.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._closing is not None
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._folder = None
        self._closing.__exit__(None, None, None)

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """A descriptor of the file `name`, for as long as the `with` lasts.

        Raises:
            CheckpointError: the file is missing, a link, a pipe, of another size, or its header contradicts the manifest.
        """
        with self._lock:
            descriptor = self._open.pop(name, None)
            self._open[name] = self._checked_open(name) if descriptor is None else descriptor  # now used last
            self._used[name] = self._used.get(name, 0) + 1
            self._close_some()
            descriptor = self._open[name]
        try:
            yield descriptor
        finally:
            with self._lock:
                self._used[name] -= 1

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def place(self, block: Block) -> Place:
        """What the (not empty) `block` of the manifest is part of."""
        return self._places[block.file, block.offset]

    @cached_property
    def _places(self) -> dict[tuple[str, int], Place]:
        places = {}
        for entry in self.manifest.entries.values():
            for chunk in entry.chunks:
                if chunk.block.bytes:
                    places[chunk.block.file, chunk.block.offset] = Place(entry, chunk.rows, chunk.columns)
            for update in entry.updates:
                for block in (update.ids, update.values):
                    if block.bytes:
                        places[block.file, block.offset] = Place(entry, None, update.columns)
            for block in entry.dropped:
                if block.bytes:
                    places[block.file, block.offset] = Place(entry, None, range(entry.columns))
        return places

    @cached_property
    def _expected(self) -> dict[str, list[tuple[header.Stored, str]]]:
        """What each file's header must list, and the key that it belongs to."""
        expected: dict[str, list[tuple[header.Stored, str]]] = {name: [] for name in self.manifest.files}
        for entry in self.manifest.entries.values():
            names = [chunk_name(entry.key, entry.shape, chunk.rows, chunk.columns) for chunk in entry.chunks]
            dtypes = [entry.dtype] * len(entry.chunks) + [torch.int64, entry.dtype] * len(entry.updates)
            dtypes += [torch.int64] * len(entry.dropped)
            names += [""] * (2 * len(entry.updates) + len(entry.dropped))  # updates are called as their writer likes, after the key
            for block, dtype, name in zip(blocks_of(entry), dtypes, names, strict=True):
                stored = header.Stored(block.offset, block.offset + block.bytes, CODES[dtype], block.bytes // dtype.itemsize, name)
                expected[block.file].append((stored, entry.key))
        return expected

    def _checked_open(self, name: str) -> int:
        if self._folder is None:
            raise CheckpointError(f"{self.folder}: its files are used outside of `with`")
        where = self.where(name)
        descriptor, size = open_regular(self._folder, name, where)
        try:
            wanted = self.manifest.files[name].bytes
            if size != wanted:
                what = "cut short" if size < wanted else "longer than it was written"
                raise CheckpointError(
                    f"{where} is {what} ({size:,} bytes, the manifest says {wanted:,}){self._tables(name)}: restore the file, or "
                    "load an older checkpoint with step="
                )
            if name == STATE:
                refuse_pickle(os.pread(descriptor, 4, 0), where)
            elif name not in self._checked:
                self._compare(name, header.read(descriptor, size, where, len(self._expected[name])))
                self._checked.add(name)
        except BaseException:
            os.close(descriptor)
            raise
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)  # pieces are read in their order: twice the readahead
        return descriptor

    def _compare(self, name: str, stored: list[header.Stored]) -> None:
        expected = sorted(self._expected[name])
        if len(stored) != len(expected):
            raise CheckpointError(f"{self.where(name)} has {len(stored)} tensors, the manifest lists {len(expected)}: {_ALTERED}")
        for found, (wanted, key) in zip(stored, expected, strict=True):
            same = (found.first, found.stop, found.code, found.elements) == (
                wanted.first,
                wanted.stop,
                wanted.code,
                wanted.elements,
            )
            named = found.name == wanted.name if wanted.name else found.name.startswith(f"{key}[")
            if not same or not (named or found.first == found.stop):  # empty ones may be in any order
                raise CheckpointError(
                    f"{self.where(name)}: its header says that bytes {found.first} to {found.stop} are {found.name!r:.200} in "
                    f"{found.code}, the manifest has {key!r} in {wanted.code} at {wanted.first} to {wanted.stop}: {_ALTERED}"
                )

    def _tables(self, name: str) -> str:
        """The tensors that a file holds parts of, for messages."""
        keys = list(dict.fromkeys(key for _, key in self._expected[name]))
        if not keys:
            return ""
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        return f"; it holds parts of {', '.join(map(repr, keys[:3]))}{more}"

    def _close_some(self) -> None:
        for name in list(self._open):
            if len(self._open) <= MOST_OPEN:
                return
            if not self._used[name]:
                os.close(self._open.pop(name))


_ALTERED = "one of the two was altered; restore the file, or load an older checkpoint with step="
