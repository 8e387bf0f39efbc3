"""One piece from a file into memory, and never an altered one; or only its hash."""

from __future__ import annotations

import hashlib
import os

import torch

from shardembed.checkpoint.format.blocks import HASH_DIGITS, Block, hash_of
from shardembed.checkpoint.format.checks import STATE
from shardembed.checkpoint.format.files import Files
from shardembed.checkpoint.format.workers import Scratch, bytes_of
from shardembed.errors import CheckpointError

STEP = 4 << 20  # bytes
REMEDY = "restore the file, or load an older checkpoint with step="


def piece_of(files: Files, block: Block, row_bytes: int, number: int, scratch: Scratch) -> torch.Tensor:
    """The bytes of piece `number` of a block, in the worker's scratch memory.

    Raises:
        CheckpointError: they are not those that were saved; the message names file, tensor and rows.
    """
    begin, size = _extent(block, row_bytes, number)
    with files.opened(block.file) as descriptor:  # compares the size first: no more memory than the file has bytes
        piece = scratch.take(size)
        done = _fill(descriptor, bytes_of(piece), begin, files.where(block.file))
    _compare(files, block, row_bytes, number, done, hash_of(bytes_of(piece)))
    return piece


def check_piece(files: Files, block: Block, row_bytes: int, number: int, scratch: Scratch) -> int:
    """As `piece_of`, but in steps and without keeping it: a single row may be as large as a file. Returns its size."""
    begin, size = _extent(block, row_bytes, number)
    done, digest = 0, hashlib.sha256()
    with files.opened(block.file) as descriptor:
        while done < size:
            part = bytes_of(scratch.take(min(STEP, size - done)))
            got = _fill(descriptor, part, begin + done, files.where(block.file))
            digest.update(part[:got])
            done += got
            if got < len(part):
                break
    _compare(files, block, row_bytes, number, done, digest.hexdigest()[:HASH_DIGITS])
    return size


def _extent(block: Block, row_bytes: int, number: int) -> tuple[int, int]:
    """Where a piece begins in its file, and its size."""
    first = number * block.rows_a_piece * row_bytes
    return block.offset + first, min(block.rows_a_piece * row_bytes, block.bytes - first)


def _compare(files: Files, block: Block, row_bytes: int, number: int, done: int, computed: str) -> None:
    if done < _extent(block, row_bytes, number)[1]:
        raise CheckpointError(f"{_lost(files, block, row_bytes, number)} are missing, the file was cut short: {REMEDY}")
    if computed != block.hashes[number]:
        raise CheckpointError(
            f"{_lost(files, block, row_bytes, number)} are damaged (hash {computed}, expected {block.hashes[number]}): {REMEDY}"
        )


def _fill(descriptor: int, data: memoryview, offset: int, where: str) -> int:
    """Read as many of the bytes as there are."""
    done = 0
    try:
        while done < len(data) and (got := os.preadv(descriptor, [data[done:]], offset + done)):
            done += got
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read at byte {offset + done}: {error.strerror}: {REMEDY}") from error
    return done


def _lost(files: Files, block: Block, row_bytes: int, number: int) -> str:
    first = number * block.rows_a_piece
    stop = min(first + block.rows_a_piece, block.bytes // row_bytes)
    if block.file == STATE:
        return f"{files.where(block.file)}: bytes {first} to {stop - 1} of the small state"
    return f"{files.where(block.file)}: {files.place(block).text(first, stop)}"
