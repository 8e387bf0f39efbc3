"""One piece from a file into memory, and never an altered one."""

from __future__ import annotations

import os

import torch

from shardembed.checkpoint.blocks import Block, hash_of
from shardembed.checkpoint.checks import STATE
from shardembed.checkpoint.files import Files
from shardembed.checkpoint.workers import Scratch, bytes_of
from shardembed.errors import CheckpointError

REMEDY = "restore the file, or load an older checkpoint with step="


def piece_of(files: Files, block: Block, row_bytes: int, number: int, scratch: Scratch) -> torch.Tensor:
    """The bytes of piece `number` of a block, in the worker's scratch memory.

    Raises:
        CheckpointError: they are not those that were saved; the message names file, tensor and rows.
    """
    first = number * block.rows_a_piece * row_bytes
    piece = scratch.take(min(block.rows_a_piece * row_bytes, block.bytes - first))
    data = bytes_of(piece)
    with files.opened(block.file) as descriptor:  # compares the size, so this is no more memory than the file has bytes
        done = _fill(descriptor, data, block.offset + first, files.where(block.file))
    if done < len(data):
        raise CheckpointError(f"{_lost(files, block, row_bytes, number)} are missing, the file was cut short: {REMEDY}")
    computed = hash_of(data)
    if computed != block.hashes[number]:
        raise CheckpointError(
            f"{_lost(files, block, row_bytes, number)} are damaged (hash {computed}, expected {block.hashes[number]}): {REMEDY}"
        )
    return piece


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
