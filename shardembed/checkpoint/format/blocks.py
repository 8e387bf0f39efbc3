"""What a checkpoint holds: entries (a tensor each), cut into chunks, each a block of consecutive bytes of a file, hashed by pieces.

Tensors are seen as two-dimensional: rows = shape[0], columns = the product of the rest; one without dimensions is 1 x 1. A piece
is as many whole rows of a chunk as fit `PIECE_BYTES`, at least one. An entry of an incremental checkpoint may hold updates
instead of chunks: row numbers, and the values that these rows have had since the full checkpoint. The entries of a dynamic table
hold nothing but updates, by id: in a full checkpoint those of all ids that have a row, in an incremental one of those that changed,
and the ids that have lost theirs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

Kind = Literal["table", "table_state", "table_ids", "dense", "dense_state"]
KINDS: tuple[Kind, ...] = ("table", "table_state", "table_ids", "dense", "dense_state")
HASH_DIGITS = 32  # 128 bits of SHA-256

CODES = {  # safetensors' names of dtypes
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in CODES}


def hash_of(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:HASH_DIGITS]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive bytes of a file: rows, hashed piece by piece.

    Attributes:
        file: its name in the checkpoint's folder.
        offset: of the first byte, from the file's start.
        bytes: how many there are.
        rows_a_piece: how many rows a hash is of; the last piece may have fewer.
        hashes: one a piece.
    """

    file: str
    offset: int
    bytes: int
    rows_a_piece: int
    hashes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A cut-out of a tensor, row after row.

    Attributes:
        rows: of the tensor.
        columns: of the tensor.
        block: where its values lie.
    """

    rows: range
    columns: range
    block: Block


@dataclass(frozen=True, slots=True)
class Update:
    """New values of some rows.

    Attributes:
        columns: of the tensor, that the values are of.
        ids: row numbers, or ids of a dynamic table, ascending and distinct, int64 `[rows]`.
        values: `[rows, columns]`.
        buckets: of a dynamic table, that the ids fall into; None: `ids` are row numbers.
    """

    columns: range
    ids: Block
    values: Block
    buckets: range | None = None

    @property
    def rows(self) -> int:
        return self.ids.bytes // torch.int64.itemsize


@dataclass(frozen=True, slots=True)
class ById:
    """What is known of a dynamic table in each of its entries.

    Attributes:
        capacity: ids that may have a row at once; None: no limit.
        buckets: into how many its ids fall (`kernels.mixing.buckets_of`); updates tile them.
        now: its time, in steps.
        seed: of the rows that ids begin with.
        whole: updates hold all rows there are; else they are newer than those of the checkpoint below.
    """

    capacity: int | None
    buckets: int
    now: int
    seed: int
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor.

    Attributes:
        key: in the state dict of the unsharded model.
        kind: what it is to the model.
        of: the key of the weight that it belongs to: of optimizer state `user.weight.exp_avg` that is `user.weight`.
        shape: of the whole tensor; of a dynamic table, with as many rows as ids have one.
        dtype: as stored.
        chunks: which hold each element once; none where the checkpoint below has them.
        updates: rows that have changed since that one.
        by_id: of a dynamic table, what is known of it; None: rows have numbers.
        dropped: of a dynamic table, ids that had a row in the checkpoint below and have none any more, ascending, int64.
    """

    key: str
    kind: Kind
    of: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...] = ()
    updates: tuple[Update, ...] = ()
    by_id: ById | None = None
    dropped: tuple[Block, ...] = ()

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def columns(self) -> int:
        return prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.rows * self.columns * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class File:
    """A file of a checkpoint.

    Attributes:
        bytes: its size.
    """

    bytes: int


@dataclass(frozen=True, slots=True)
class Base:
    """The full checkpoint that an incremental one stands on.

    Attributes:
        folder: beside this one.
        checksum: of its manifest.
    """

    folder: str
    checksum: str


@dataclass(frozen=True)
class Listing:
    """All that a checkpoint holds.

    Attributes:
        step: of training.
        world_size: of the job that saved it.
        created: when, in ISO 8601.
        versions: of the packages that wrote it, by name.
        entries: tensors, by key.
        files: by name.
        plans: of the model's collections, as `Plan.to_json` gives them.
        state: where the small state lies.
        base: what an incremental checkpoint stands on; None for a full one.
        previous: the folder of the checkpoint that this training saved or loaded before. Format 1 did not know it.
        nonfinite: keys of tables, parameters and their state that hold inf or nan. Format 1 did not know them.
    """

    step: int
    world_size: int
    created: str
    versions: Mapping[str, str]
    entries: Mapping[str, Entry]
    files: Mapping[str, File]
    plans: tuple[dict[str, Any], ...]
    state: Block
    base: Base | None = None
    previous: str | None = None
    nonfinite: tuple[str, ...] = ()


def chunk_name(key: str, shape: tuple[int, ...], rows: range, columns: range) -> str:
    """What a chunk is called inside its file: the key where it is the whole tensor, else with its rows and columns."""
    all_rows, all_columns = (shape[0] if shape else 1), prod(shape[1:])
    if len(rows) == all_rows and len(columns) == all_columns:
        return key
    return f"{key}[{rows_name(rows, all_rows)},{columns.start}:{columns.stop}]"


def rows_name(rows: range, total: int) -> str:
    """`0:500`, or `1::4` for every fourth row from row 1 to the end."""
    last = rows[-1] if rows else rows.start - 1
    if rows.step == 1:
        return f"{rows.start}:{last + 1}"
    stop = "" if last + rows.step >= total else str(last + 1)
    return f"{rows.start}:{stop}:{rows.step}"


def id_names(key: str, buckets: range, total: int, columns: range) -> tuple[str, str, str]:
    """What ids, values and dropped ids of some buckets of a dynamic table are called inside their file."""
    cut = f"{key}[{rows_name(buckets, total)},{columns.start}:{columns.stop}]"
    return f"{cut}.ids", f"{cut}.values", f"{cut}.dropped"


def update_names(key: str, rows: range, columns: range, total: int) -> tuple[str, str]:
    """What an update's row numbers and values are called inside their file, for updates of a shard that holds `rows`."""
    cut = f"{rows_name(rows, total)},{columns.start}:{columns.stop}"
    return f"{key}[{cut}].ids", f"{key}[{cut}].values"
