"""Starting weights that do not depend on how a table is cut.

Rows are drawn in blocks of `BLOCK_ROWS` whole rows, each block by its own counter-based stream (Philox 4x64-10, Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) whose key is a hash of (seed, table name) and whose counter starts at
the block's number. A rank draws the blocks its shards touch and keeps its rows and columns, so every plan, world size and
device starts from the same table; the price is that a rank with a strip of columns or every n-th row also draws what it drops.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch

from shardembed.errors import ConfigError
from shardembed.tables.layout import meeting
from shardembed.tables.table_config import Constant, Normal, TableConfig, Uniform

BLOCK_ROWS = 4096


def fill(out: torch.Tensor, table: TableConfig, seed: int, rows: range, columns: range) -> None:
    """Write the starting values of `rows` x `columns` of `table` into `out` `[len(rows), len(columns)]`, block by block."""
    start = table.start
    if isinstance(start, Constant):
        out.fill_(start.value)
    else:
        _fill_blocks(out, table, seed, rows, columns)
    if table.padding_idx is not None and table.padding_idx in rows:
        out[rows.index(table.padding_idx)] = 0


def _fill_blocks(out: torch.Tensor, table: TableConfig, seed: int, rows: range, columns: range) -> None:
    start = table.start
    for block, kept, span in _blocks(rows, table.num_embeddings):
        if isinstance(start, Normal | Uniform):
            values = torch.from_numpy(_draw(start, _stream(seed, table.name, block.start), (len(block), table.embedding_dim)))
            values = values[kept]
        else:
            assert not isinstance(start, Constant)
            numbers = torch.arange(block.start, block.stop)[kept]
            values = start(numbers)
            if values.shape != (len(numbers), table.embedding_dim):
                raise ConfigError(
                    f"table {table.name!r}: init returned shape {tuple(values.shape)} for {len(numbers)} rows; "
                    f"it must return [{len(numbers)}, {table.embedding_dim}]"
                )
        out[span] = values[:, columns.start : columns.stop].to(out.dtype)


def _blocks(rows: range, num_embeddings: int) -> Iterator[tuple[range, slice, slice]]:
    """The blocks that `rows` touch: (block, which of its rows, where they go)."""
    if not rows:
        return
    for first in range(rows.start // BLOCK_ROWS * BLOCK_ROWS, rows[-1] + 1, BLOCK_ROWS):
        block = range(first, min(first + BLOCK_ROWS, num_embeddings))
        if met := meeting(rows, block.start, block.stop):
            yield block, *met


def table_hash(seed: int, name: str) -> int:
    """64 bits, as a signed integer, that are the table's own."""
    return int.from_bytes(_digest(seed, name)[:8], "little", signed=True)


def _digest(seed: int, name: str) -> bytes:
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()


def _stream(seed: int, name: str, first_row: int) -> np.random.Generator:
    key = np.frombuffer(_digest(seed, name), dtype=np.uint64)
    # The block number sits in the counter's top word: a block would have to draw 2^192 numbers to run into the next one.
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, first_row // BLOCK_ROWS]))


def _draw(start: Normal | Uniform, stream: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    if isinstance(start, Normal):
        values = stream.standard_normal(shape, dtype=np.float32)
        values *= np.float32(start.std)
        values += np.float32(start.mean)
    else:
        values = stream.random(shape, dtype=np.float32)
        values *= np.float32(start.high - start.low)
        values += np.float32(start.low)
    return values
