"""Starting weights that do not depend on how a table is cut.

Rows are drawn in blocks of `BLOCK_ROWS` whole rows, each block by its own counter-based stream (Philox 4x64-10, Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011) whose key is a hash of (seed, table name) and whose counter starts at
the block's number. A rank draws the blocks its shards touch and keeps its rows and columns, so every plan, world size and
device starts from the same table; the price is that a rank with a strip of columns or every n-th row also draws what it drops.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from shardembed.config import cores
from shardembed.errors import ConfigError
from shardembed.tables.layout import meeting
from shardembed.tables.table_config import Constant, Loaded, Normal, RowFunction, TableConfig, Uniform

BLOCK_ROWS = 4096
PIECE = 1 << 15  # numbers that are drawn, then scaled in the cache
WORTH = 1 << 19  # numbers, some milliseconds, for which one more thread is started
MOST_CORES = 16  # which write as fast as memory takes it


def fill(out: torch.Tensor, table: TableConfig, seed: int, rows: range, columns: range) -> None:
    """Write the starting values of `rows` x `columns` of `table` into `out` `[len(rows), len(columns)]`, block by block."""
    start = table.start
    if isinstance(start, Constant):
        out.fill_(start.value)
    elif isinstance(start, Normal | Uniform):
        _draw_blocks(out, table, start, seed, rows, columns)
    else:
        assert not isinstance(start, Loaded), "what is loaded starts as something else"
        _call_for_blocks(out, table, start, rows, columns)
    if table.padding_idx is not None and table.padding_idx in rows:
        out[rows.index(table.padding_idx)] = 0


def _draw_blocks(out: torch.Tensor, table: TableConfig, start: Normal | Uniform, seed: int, rows: range, columns: range) -> None:
    # What NumPy can write is written on several cores, by threads in which torch's modes (inference_mode, say) do not hold.
    target = out.detach().numpy() if out.device.type == "cpu" and out.dtype in (torch.float32, torch.float64) else None
    many = max(1, PIECE // table.embedding_dim)  # rows

    def draw(numbers: range) -> None:
        beside = np.empty((0, table.embedding_dim), np.float32)
        for block, kept, span in _blocks(rows, table.num_embeddings, numbers):
            stream = _stream(seed, table.name, block.start)
            there = None if target is None else target[span]
            if there is not None and _takes(there, len(block), table.embedding_dim):
                values, there = there, None
            else:
                beside = beside if len(beside) else np.empty((BLOCK_ROWS, table.embedding_dim), np.float32)
                values = beside[: len(block)]
            for first in range(0, len(block), many):
                _draw(start, stream, values[first : first + many])
            if there is not None:
                there[:] = values[kept, columns.start : columns.stop]
            elif target is None:
                out[span] = torch.from_numpy(values[kept, columns.start : columns.stop]).to(out.dtype)

    numbers = _touched(rows)
    workers = max(1, min(_cores(), len(numbers) * BLOCK_ROWS * table.embedding_dim // WORTH)) if target is not None else 1
    if workers == 1:
        draw(numbers)
        return
    with ThreadPoolExecutor(workers) as pool:
        parts = [numbers[len(numbers) * n // workers : len(numbers) * (n + 1) // workers] for n in range(workers)]
        for done in pool.map(draw, parts):
            assert done is None  # or its error has been raised


def _takes(there: np.ndarray, rows: int, columns: int) -> bool:
    """A whole block can be drawn where it belongs."""
    return there.dtype == np.float32 and there.shape == (rows, columns) and there.flags.c_contiguous


def _call_for_blocks(out: torch.Tensor, table: TableConfig, start: RowFunction, rows: range, columns: range) -> None:
    for block, kept, span in _blocks(rows, table.num_embeddings, _touched(rows)):
        numbers = torch.arange(block.start, block.stop)[kept]
        values = start(numbers)
        if values.shape != (len(numbers), table.embedding_dim):
            raise ConfigError(
                f"table {table.name!r}: init returned shape {tuple(values.shape)} for {len(numbers)} rows; "
                f"it must return [{len(numbers)}, {table.embedding_dim}]"
            )
        out[span] = values[:, columns.start : columns.stop].to(out.dtype)


def _cores() -> int:
    """Cores for this process, of those that the ranks of this machine share."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return min(MOST_CORES, max(1, cores.usable() // ranks))


def _touched(rows: range) -> range:
    """The numbers of the blocks that `rows` begin and end in, and of all between."""
    return range(rows[0] // BLOCK_ROWS, rows[-1] // BLOCK_ROWS + 1) if rows else range(0)


def _blocks(rows: range, num_embeddings: int, numbers: range) -> Iterator[tuple[range, slice, slice]]:
    """Of some blocks those that `rows` touch: (block, which of its rows, where they go)."""
    for number in numbers:
        block = range(number * BLOCK_ROWS, min((number + 1) * BLOCK_ROWS, num_embeddings))
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


def _draw(start: Normal | Uniform, stream: np.random.Generator, out: np.ndarray) -> None:
    """Fill `out`, float32, with the next numbers of the stream."""
    if isinstance(start, Normal):
        stream.standard_normal(dtype=np.float32, out=out)
        out *= np.float32(start.std)
        out += np.float32(start.mean)
    else:
        stream.random(dtype=np.float32, out=out)
        out *= np.float32(start.high - start.low)
        out += np.float32(start.low)
