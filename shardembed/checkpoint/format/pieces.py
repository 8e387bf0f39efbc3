"""The only code that writes and reads tensor data: by pieces, hashed on the way out and compared with their hash on the way in."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shardembed.checkpoint.format import header
from shardembed.checkpoint.format.blocks import CODES, Block, Entry, Update, hash_of
from shardembed.checkpoint.format.copies import Copy, run_copies
from shardembed.checkpoint.format.files import Files
from shardembed.checkpoint.format.reading import piece_of
from shardembed.checkpoint.format.workers import Scratch, bytes_of, spread
from shardembed.errors import CheckpointError
from shardembed.kernels.mixing import buckets_of
from shardembed.kernels.reference import is_finite

__all__ = ["Copy", "Files", "Part", "read_dropped", "read_ids", "read_state", "run_copies", "write_file", "write_state"]

PIECE_BYTES = 8 << 20
WORKERS = 2


@dataclass(frozen=True)
class Part:
    """A tensor for a file.

    Attributes:
        name: in the file's header.
        data: a two-dimensional view, with any strides, on any device.
        shape: what the header says; None: that of what is written.
        listed: only the rows at these places, int64; None: all.
    """

    name: str
    data: torch.Tensor
    shape: tuple[int, ...] | None = None
    listed: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.data) if self.listed is None else len(self.listed)

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes

    def some(self, first: int, stop: int) -> torch.Tensor:
        """Rows from `first` up to `stop`."""
        return self.data[first:stop] if self.listed is None else self.data[self.listed[first:stop].to(self.data.device)]

    @property
    def row_bytes(self) -> int:
        return self.data.shape[1] * self.data.dtype.itemsize


def write_file(
    path: Path, parts: Sequence[Part], metadata: Mapping[str, str], workers: int = WORKERS, nonfinite: set[str] | None = None
) -> dict[str, Block]:
    """Write `parts` as a new safetensors file, onto the disk itself; returns each part's block by its name.

    `nonfinite` gets the names of those that hold inf or nan; a piece is looked through while it is at hand to be hashed.

    Beyond the tensors this needs `PIECE_BYTES` (or the longest row, where that is more) a worker, and only for parts that are
    not contiguous on the CPU.

    Raises:
        CheckpointError: the file exists, or cannot be written whole.
    """
    parts = sorted(parts, key=lambda part: -part.data.dtype.itemsize)  # so that every tensor is aligned
    for part in parts:
        if part.data.dtype not in CODES:
            raise CheckpointError(f"{part.name!r} is of {part.data.dtype}, which a safetensors file cannot hold")
    head, offsets = header.encode([(part.name, part.data.dtype, _shape(part)) for part in parts], metadata)
    hashes: list[list[str]] = [[""] * _pieces(part) for part in parts]

    def write_piece(task: tuple[int, int], scratch: Scratch) -> None:
        number, piece = task
        part, rows = parts[number], _rows_a_piece(parts[number])
        values = _contiguous(part.some(piece * rows, (piece + 1) * rows), scratch)
        if nonfinite is not None and part.name not in nonfinite and not is_finite(values.view(part.data.dtype)):
            nonfinite.add(part.name)
        data = bytes_of(values)
        offset = offsets[number] + piece * rows * part.row_bytes
        _write(descriptor, data, offset)
        _begin_writing_out(descriptor, offset, len(data))
        hashes[number][piece] = hash_of(data)

    with _new_file(path) as descriptor:
        _write(descriptor, memoryview(head), 0)
        tasks = ((number, piece) for number, found in enumerate(hashes) for piece in range(len(found)))
        spread(tasks, write_piece, workers)
    return {
        part.name: Block(path.name, offset, part.bytes, _rows_a_piece(part), tuple(found))
        for part, offset, found in zip(parts, offsets, hashes, strict=True)
    }


def write_state(path: Path, data: bytes) -> Block:
    """Write the small state as a new file, onto the disk itself."""
    with _new_file(path) as descriptor:
        _write(descriptor, memoryview(data), 0)
    hashes = [hash_of(data[first : first + PIECE_BYTES]) for first in range(0, len(data), PIECE_BYTES)]
    return Block(path.name, 0, len(data), PIECE_BYTES, tuple(hashes))


def read_state(files: Files) -> bytes:
    """The small state, compared with its hash."""
    block, scratch = files.manifest.state, Scratch()
    return b"".join(bytes(bytes_of(piece_of(files, block, 1, number, scratch))) for number in range(len(block.hashes)))


def read_ids(files: Files, entry: Entry, update: Update) -> Iterator[tuple[int, torch.Tensor]]:
    """The row numbers of an update, or its ids, a piece at a time, with the position of the piece's first.

    Raises:
        CheckpointError: they are damaged, not ascending, or not rows of the tensor, or an id belongs to another shard.
    """
    for first, ids in _ascending(files, entry, update.ids):
        where = f"{files.where(update.ids.file)}: the updated rows of {entry.key!r}"
        if entry.by_id is None and (ids[0] < 0 or ids[-1] >= entry.rows):
            raise CheckpointError(f"{where} are not numbers below {entry.rows}")
        if entry.by_id is not None and update.buckets is not None:
            buckets, mine = buckets_of(ids, entry.by_id.buckets), update.buckets
            wrong = (buckets < mine.start) | (buckets >= mine.stop) | ((buckets - mine.start) % mine.step != 0)
            if bool(wrong.any()):
                raise CheckpointError(f"{where} hold id {int(ids[wrong][0])}, which belongs to another shard")
        yield first, ids


def read_dropped(files: Files, entry: Entry) -> torch.Tensor:
    """The ids that have lost their rows, int64.

    Raises:
        CheckpointError: they are damaged, or not ascending.
    """
    parts = [ids for block in entry.dropped for _, ids in _ascending(files, entry, block)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])


def _ascending(files: Files, entry: Entry, block: Block) -> Iterator[tuple[int, torch.Tensor]]:
    scratch, last = Scratch(), None
    for number in range(len(block.hashes)):
        # A copy: the next piece is read into the same scratch, and the caller may still hold this one.
        ids = piece_of(files, block, torch.int64.itemsize, number, scratch).view(torch.int64).clone()
        if (last is not None and ids[0] <= last) or not bool((ids[1:] > ids[:-1]).all()):
            raise CheckpointError(f"{files.where(block.file)}: the updated rows of {entry.key!r} are not ascending numbers")
        last = int(ids[-1])
        yield number * block.rows_a_piece, ids


def _rows_a_piece(part: Part) -> int:
    return max(1, PIECE_BYTES // part.row_bytes) if part.row_bytes else 1


def _pieces(part: Part) -> int:
    return -(-part.rows // _rows_a_piece(part)) if part.bytes else 0


def _shape(part: Part) -> tuple[int, ...]:
    return (part.rows, part.data.shape[1]) if part.shape is None else part.shape


def _contiguous(rows: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The bytes of some rows, one after the other, on the CPU; a copy only where they are not so already."""
    rows = rows.detach()
    if rows.device.type != "cpu" or not rows.is_contiguous():
        memory = scratch.take(rows.nbytes, pinned=rows.device.type == "cuda")
        rows = memory.view(rows.dtype).view(rows.shape).copy_(rows)
    return rows.reshape(-1).view(torch.uint8)


class _new_file:
    """A file that must not exist yet; when the `with` ends well, all of it is on the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1

    def __enter__(self) -> int:
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise self._told(error) from error
        return self._descriptor

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                os.fsync(self._descriptor)
        except OSError as failure:
            raise self._told(failure) from failure
        finally:
            os.close(self._descriptor)
        if isinstance(error, OSError):
            raise self._told(error) from error

    def _told(self, error: OSError) -> CheckpointError:
        return CheckpointError(f"{self._path} cannot be written: {error.strerror or error}")


def _begin_writing_out(descriptor: int, offset: int, size: int) -> None:
    """Have the system bring these bytes to the disk while others are hashed, and not all of them at the end (Linux)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):  # a write may stop short, as it does when the disk is nearly full
        done += os.pwrite(descriptor, data[done:], offset + done)
