"""Reading a shard from something that holds the whole table: only its rows and columns, a bounded piece at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from shardembed.tables.layout import Shard

CHUNK_BYTES = 64 * 1024 * 1024


def shape_of(source: Any) -> tuple[int, ...]:
    """Shape of a tensor, an array, or a slice of a safetensors file (which has a method instead)."""
    return tuple(source.get_shape() if hasattr(source, "get_shape") else source.shape)


def load_shard(out: torch.Tensor, shard: Shard, source: Any) -> None:
    """Copy what `shard` holds of `source` into `out`."""
    rows, columns = shard.rows, shard.columns
    # Of every n-th row, all between may be read too.
    many = max(1, CHUNK_BYTES // (len(columns) * out.element_size() * rows.step))
    for first in range(0, len(rows), many):
        piece = rows[first : first + many]
        out[first : first + many].copy_(read_rows(source, piece, columns))


def read_rows(source: Any, rows: range, columns: range) -> torch.Tensor:
    """These rows and columns of what holds more: a tensor, an array, or a slice of a safetensors file."""
    if hasattr(source, "get_shape"):  # safetensors slices know no step
        return source[rows.start : rows[-1] + 1, columns.start : columns.stop][:: rows.step]
    part = source[rows.start : rows[-1] + 1 : rows.step, columns.start : columns.stop]
    if isinstance(part, np.ndarray) and not part.flags.writeable:
        part = np.array(part)  # torch warns of read-only memory, which a mapped file is
    return torch.as_tensor(part)
