"""What must hold in a manifest, whoever wrote it. Each check raises ValueError with what is wrong; `manifest` says where.

Numbers are never trusted with memory: a block must lie inside a file whose size is compared with the real one before it is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod

import torch

from shardembed.checkpoint.format.blocks import CODES, HASH_DIGITS, KINDS, Base, Block, ById, Chunk, Entry, Listing, Update
from shardembed.checkpoint.format.tiling import check_tiling

STATE = "state.json"
TENSOR_FILE = re.compile(r"rank-[0-9]{5}\.safetensors")
STEP_FOLDER = re.compile(r"step-([0-9]{10})(?:-r([0-9]{1,9}))?(?:\.([0-9]{1,9}))?")  # step, returns, generation
PIECE_LIMIT = 64 << 20  # bytes that a reader keeps in memory for a piece of several rows
STATE_LIMIT = 256 << 20
KEY_LIMIT = 1024
DIMENSIONS_LIMIT = 64
MOST = 2**63 - 1
MOST_BUCKETS = 2**32
OWNERS = {"table_state": "table", "table_ids": "table", "dense_state": "dense"}  # what the weights of such entries are
_HASH = re.compile(rf"[0-9a-f]{{{HASH_DIGITS}}}")


def check_manifest(manifest: Listing) -> None:
    """Raise ValueError unless the whole manifest is consistent."""
    for name in manifest.files:
        if name != STATE and not TENSOR_FILE.fullmatch(name):
            raise ValueError(f"file name {name!r:.80} is neither {STATE} nor rank-NNNNN.safetensors; no other file is read")
    if manifest.base is not None:
        _check_base(manifest.base)
    if manifest.previous is not None and not STEP_FOLDER.fullmatch(manifest.previous):
        raise ValueError(f"the checkpoint before must be a folder named step-NNNNNNNNNN, not {manifest.previous!r:.80}")
    for key in manifest.nonfinite:
        if key not in manifest.entries:
            raise ValueError(f"{key!r:.200} is said to hold inf or nan, and is no tensor here")
    for text in (manifest.created, *manifest.versions, *manifest.versions.values()):
        if len(text) > KEY_LIMIT or not text.isprintable():
            raise ValueError(f"{text!r:.80} is not printable text")
    for key, entry in manifest.entries.items():
        try:
            _check_entry(entry, manifest.base is not None)
            _check_owner(entry, manifest.entries)
        except ValueError as error:
            raise ValueError(f"tensor {key!r:.200}: {error}") from error
    if manifest.state.file != STATE or manifest.state.bytes > STATE_LIMIT:
        raise ValueError(f"the small state must be in {STATE}, in at most {STATE_LIMIT:,} bytes")
    check_block(manifest.state, manifest.state.bytes, 1)
    _check_places(manifest)


def _check_base(base: Base) -> None:
    if not STEP_FOLDER.fullmatch(base.folder):
        raise ValueError(f"the full checkpoint below must be a folder named step-NNNNNNNNNN, not {base.folder!r:.80}")
    if not _HASH.fullmatch(base.checksum):
        raise ValueError(f"the checksum of the full checkpoint below is not {HASH_DIGITS} hexadecimal digits")


def _check_entry(entry: Entry, incremental: bool) -> None:
    key = entry.key
    if not key or len(key) > KEY_LIMIT or not key.isprintable() or key == "__metadata__":
        raise ValueError(f"a key must be 1 to {KEY_LIMIT} printable characters")
    if entry.kind not in KINDS:
        raise ValueError(f"kind {entry.kind!r:.40} is none of {', '.join(KINDS)}")
    if entry.dtype not in CODES:
        raise ValueError(f"{entry.dtype} cannot be stored")
    if len(entry.shape) > DIMENSIONS_LIMIT or prod(entry.shape) * entry.dtype.itemsize > MOST:
        raise ValueError("its shape is beyond 64 bits")
    for number, chunk in enumerate(entry.chunks):
        try:
            _check_chunk(entry, chunk)
        except ValueError as error:
            raise ValueError(f"chunk {number}: {error}") from error
    if entry.by_id is not None:
        _check_by_id(entry, entry.by_id, incremental)
    elif entry.chunks or not incremental:
        if entry.updates:
            raise ValueError("it has chunks of its own and updates, or updates and nothing below that they change")
        check_tiling(entry.rows, entry.columns, [(chunk.rows, chunk.columns) for chunk in entry.chunks])
    for number, update in enumerate(entry.updates):
        try:
            _check_update(entry, update)
        except ValueError as error:
            raise ValueError(f"update {number}: {error}") from error


def _check_by_id(entry: Entry, by_id: ById, incremental: bool) -> None:
    if entry.chunks or not entry.shape:
        raise ValueError("the rows of a dynamic table have ids, and no place in chunks")
    if not 1 <= by_id.buckets <= MOST_BUCKETS:
        raise ValueError(f"ids cannot fall into {by_id.buckets} buckets")
    if not by_id.whole and not incremental:
        raise ValueError("it changes rows, and there is nothing below")
    if by_id.whole and entry.dropped:
        raise ValueError("it holds all rows, and ids that have lost theirs")
    for block in entry.dropped:
        check_block(block, block.bytes // torch.int64.itemsize, torch.int64.itemsize)
    strips: dict[range, int] = {}
    cuts: list[tuple[range, range]] = []
    for update in entry.updates:
        assert update.buckets is not None
        _check_inside(update.buckets, by_id.buckets, "buckets")
        strips[update.columns] = strips.get(update.columns, 0) + update.rows
        cuts.append((update.buckets, update.columns))
    check_tiling(by_id.buckets, entry.columns, cuts)
    wrong = [rows for rows in strips.values() if rows != entry.rows]
    if by_id.whole and wrong:
        raise ValueError(f"its updates hold {wrong[0]} rows of {entry.rows}")


def _check_owner(entry: Entry, entries: Mapping[str, Entry]) -> None:
    if entry.kind not in OWNERS:
        if entry.of != entry.key:
            raise ValueError(f"a weight belongs to itself, not to {entry.of!r:.200}")
        return
    owner = entries.get(entry.of)
    if owner is None or owner.kind != OWNERS[entry.kind] or not entry.key.startswith(f"{entry.of}."):
        raise ValueError(f"it is {entry.kind} of {entry.of!r:.200}, which is no {OWNERS[entry.kind]} weight here")
    if (owner.by_id is None) != (entry.by_id is None) or (entry.kind == "table_ids" and entry.by_id is None):
        raise ValueError(f"its rows are named in another way than those of {entry.of!r:.200}")


def _check_chunk(entry: Entry, chunk: Chunk) -> None:
    _check_inside(chunk.rows, entry.rows, "rows")
    _check_inside(chunk.columns, entry.columns, "columns")
    check_block(chunk.block, len(chunk.rows), len(chunk.columns) * entry.dtype.itemsize)


def _check_update(entry: Entry, update: Update) -> None:
    _check_inside(update.columns, entry.columns, "columns")
    rows, rest = divmod(update.ids.bytes, torch.int64.itemsize)
    most = entry.rows if entry.by_id is None else MOST
    if rest or rows > most:
        raise ValueError(f"{update.ids.bytes} bytes are not the numbers of at most {entry.rows} rows")
    check_block(update.ids, rows, torch.int64.itemsize)
    check_block(update.values, rows, len(update.columns) * entry.dtype.itemsize)


def _check_inside(part: range, whole: int, what: str) -> None:
    if part and part[-1] >= whole:
        raise ValueError(f"{what} go up to {part[-1]}, the tensor has {whole}")


def check_block(block: Block, rows: int, row_bytes: int) -> None:
    if block.bytes != rows * row_bytes:
        raise ValueError(f"{block.bytes} bytes in {block.file} cannot be {rows} rows of {row_bytes} bytes")
    if block.rows_a_piece < 1:
        raise ValueError("a piece has at least one row")
    if block.rows_a_piece > 1 and min(block.rows_a_piece, rows) * row_bytes > PIECE_LIMIT:
        raise ValueError(f"pieces of {block.rows_a_piece} rows of {row_bytes} bytes are larger than {PIECE_LIMIT:,} bytes")
    pieces = -(-rows // block.rows_a_piece) if block.bytes else 0
    if len(block.hashes) != pieces:
        raise ValueError(f"{len(block.hashes)} hashes for {pieces} pieces")
    for text in block.hashes:
        if not _HASH.fullmatch(text):
            raise ValueError(f"a hash is not {HASH_DIGITS} hexadecimal digits")


def blocks_of(entry: Entry) -> list[Block]:
    updates = [block for update in entry.updates for block in (update.ids, update.values)]
    return [*(chunk.block for chunk in entry.chunks), *updates, *entry.dropped]


def _check_places(manifest: Listing) -> None:
    """Blocks lie in files that are listed, and no two of them share a byte."""
    places: dict[str, list[tuple[int, int, str]]] = {name: [] for name in manifest.files}
    owned = [(key, block) for key, entry in manifest.entries.items() for block in blocks_of(entry)]
    for key, block in [*owned, (STATE, manifest.state)]:
        if block.file not in places or (block.file == STATE) != (key == STATE and block is manifest.state):
            raise ValueError(f"tensor {key!r:.200}: {block.file!r:.80} is not a file that can hold it")
        places[block.file].append((block.offset, block.offset + block.bytes, key))
    for name, found in places.items():
        size, edge = manifest.files[name].bytes, 0
        if name == STATE and (manifest.state.offset, manifest.state.bytes) != (0, size):
            raise ValueError(f"{STATE} has {size} bytes, of which some are not hashed")
        for first, stop, key in sorted(found):
            if stop > size:
                raise ValueError(f"tensor {key!r:.200}: its bytes {first} to {stop - 1} lie beyond the {size} bytes of {name}")
            if first < edge and stop > first:
                raise ValueError(f"tensor {key!r:.200}: its bytes from {first} on in {name} belong to another chunk too")
            edge = max(edge, stop)
