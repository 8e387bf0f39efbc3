"""The manifest: what is written is read again, and what may not be believed is refused with where and why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.checkpoint.format import manifest as manifest_module
from shardembed.checkpoint.format.blocks import DTYPES, Base, Block, Chunk, Entry, File, Update, update_names
from shardembed.checkpoint.format.manifest import FORMAT, Manifest, read_manifest, resolve
from shardembed.checkpoint.format.strict import loads
from shardembed.errors import CheckpointError
from tests.unit.checkpoint.saved import Writer, increment, numbered, small_checkpoint
from tests.unit.drawn import layouts

HASH = "0123456789abcdef" * 2
STATE = Block("state.json", 0, 2, 1 << 20, (HASH,))
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1, max_size=8)


def manifest_of(*entries: Entry, size: int = 1 << 20, **changes: Any) -> Manifest:
    files = {"rank-00000.safetensors": File(size), "state.json": File(2)}
    made = Manifest(7, 3, "2026-11-24", {"torch": "2"}, {entry.key: entry for entry in entries}, files, (), STATE)
    return replace(made, **changes)


def block(offset: int, size: int, rows_a_piece: int, pieces: int) -> Block:
    return Block("rank-00000.safetensors", offset, size, rows_a_piece, (HASH,) * pieces)


def drawn_entry(data: st.DataObject, key: str, offset: int, updated: bool) -> tuple[Entry, int]:
    """An entry whose blocks begin at `offset`, and where they end."""
    rows, columns = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 6))
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    shape = data.draw(st.sampled_from([(rows, columns), (rows, 1, columns), (rows, columns, 1)]))

    def next_block(count: int, row_bytes: int) -> Block:
        nonlocal offset
        rows_a_piece = data.draw(st.integers(1, 40))
        made = block(offset, count * row_bytes, rows_a_piece, -(-count // rows_a_piece) if row_bytes else 0)
        offset += made.bytes
        return made

    if updated:
        count = data.draw(st.integers(0, rows))
        update = Update(range(columns), next_block(count, 8), next_block(count, columns * dtype.itemsize))
        return Entry(key, "table", key, shape, dtype, (), (update,)), offset
    chunks = [
        Chunk(shard.rows, shard.columns, next_block(len(shard.rows), len(shard.columns) * dtype.itemsize))
        for shard in data.draw(layouts(rows, columns, world_size=3)).shards
    ]
    return Entry(key, "dense", key, shape, dtype, tuple(chunks)), offset


@given(st.data(), st.lists(TEXT, unique=True, max_size=4), st.booleans())
def test_a_manifest_is_read_as_it_was_written(data: st.DataObject, keys: list[str], incremental: bool) -> None:
    entries, offset = [], 10
    for key in keys:
        entry, offset = drawn_entry(data, key, offset, incremental and data.draw(st.booleans()))
        entries.append(entry)
    base = Base("step-0000000001.2", HASH) if incremental else None
    plans = ({"format": 1, "tables": {key: [1, 2] for key in keys}},)
    come = {"previous": data.draw(st.sampled_from([None, "step-0000000003-r2.1"])), "nonfinite": tuple(keys[:2])}
    made = manifest_of(*entries, size=offset, base=base, plans=plans, step=data.draw(st.integers(0, 2**40)), **come)
    read = Manifest.parse(made.to_bytes(), "manifest.json")
    assert read == made
    assert read.checksum == made.checksum
    assert read.to_bytes() == made.to_bytes()


def test_layout_and_order_of_the_file_do_not_matter_but_contents_do() -> None:
    entry = Entry("a", "dense", "a", (2,), torch.float32, (Chunk(range(2), range(1), block(8, 8, 2, 1)),))
    made = manifest_of(entry)
    data = json.loads(made.to_bytes())
    turned = {name: data[name] for name in reversed(list(data))}
    assert Manifest.parse(json.dumps(turned, indent=3).encode(), "m") == made
    data["step"] = 8
    with pytest.raises(
        CheckpointError, match=r"m: the manifest is damaged \(checksum '[0-9a-f]{32}', its contents have '[0-9a-f]{32}'\)"
    ):
        Manifest.parse(json.dumps(data).encode(), "m")


def test_format_1_is_read_as_it_was(tmp_path: Path) -> None:
    entry = Entry("a", "dense", "a", (2,), torch.float32, (Chunk(range(2), range(1), block(8, 8, 2, 1)),))
    made = manifest_of(entry)
    data = json.loads(made.to_bytes())
    for name in ("checksum", "previous", "nonfinite"):
        del data[name]
    data["format"] = 1
    data["checksum"] = manifest_module._checksum(data)
    assert Manifest.parse(json.dumps(data).encode(), "m") == made
    data["previous"] = None
    del data["checksum"]
    data["checksum"] = manifest_module._checksum(data)
    with pytest.raises(CheckpointError, match="field 'previous' is unknown"):
        Manifest.parse(json.dumps(data).encode(), "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"previous": "../step-0000000001"}, "the checkpoint before must be a folder named step-NNNNNNNNNN"),
        ({"nonfinite": ("b",)}, "'b' is said to hold inf or nan, and is no tensor here"),
    ],
)
def test_where_it_comes_from_and_what_is_lost_are_checked(change: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        manifest_of(A, **change).to_bytes()


def test_a_newer_format_is_told_before_anything_else() -> None:
    newer = {"format": FORMAT + 1, "entries": "in a way of its own"}
    with pytest.raises(
        CheckpointError, match=rf"m: .* newer version of shardembed: format {FORMAT + 1}, this version reads up to {FORMAT}"
    ):
        Manifest.parse(json.dumps(newer).encode(), "m")
    for no_format in (0, -1, "1", True, None, [1]):
        with pytest.raises(CheckpointError, match="does not exist"):
            Manifest.parse(json.dumps({"format": no_format}).encode(), "m")
    for other in ({}, [], 1, "format", None, {"version": 1}):
        with pytest.raises(CheckpointError, match="not the manifest of a checkpoint"):
            Manifest.parse(json.dumps(other).encode(), "m")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' occurs twice"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 1_000_000 + b"]", "a number of 1000000 digits"),
        (b"[-" + b"9" * 21 + b"]", "a number of 22 digits"),
        (b"[NaN]", "NaN is not a whole number"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"[1.0]", "1.0 is not a whole number"),
        (b"[1e400]", "1e400 is not"),
        (b'["\xff"]', "can't decode"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM|Expecting value"),
        (b"", "Expecting value"),
        (b'{"a": 1} x', "Extra data"),
        (b"{'a': 1}", "property name"),
        (b"[" + b"[]," * 9_000_000 + b"[]]", "more than 8,388,608 values"),
        (b"\x80\x04\x95", "holds a pickle"),
        (b"PK\x03\x04", "holds a pickle"),
    ],
)
def test_json_that_is_not_plain_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(CheckpointError, match=f"^the file.*({says})"):
        loads(text, "the file")


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_checkpoint(tmp_path / "step-0000000001")
    monkeypatch.setattr(manifest_module, "SIZE_LIMIT", 100)
    with pytest.raises(CheckpointError, match=r"manifest.json has [0-9,]+ bytes, and at most 100 are read"):
        read_manifest(tmp_path / "step-0000000001")


A = Entry("a", "table", "a", (4, 2), torch.float32, (Chunk(range(4), range(2), block(8, 32, 4, 1)),))
WRONG: dict[str, tuple[Entry, str]] = {
    "rows": (replace(A, chunks=(Chunk(range(5), range(2), block(8, 40, 4, 2)),)), "rows go up to 4, the tensor has 4"),
    "gap": (replace(A, chunks=(Chunk(range(3), range(2), block(8, 24, 4, 1)),)), "up to 2, the tensor has 4 rows"),
    "none": (replace(A, chunks=()), "up to 0, the tensor has 2"),
    "bytes": (replace(A, chunks=(Chunk(range(4), range(2), block(8, 33, 4, 1)),)), "33 bytes in .* cannot be 4 rows of 8 bytes"),
    "hashes": (replace(A, chunks=(Chunk(range(4), range(2), block(8, 32, 3, 1)),)), "1 hashes for 2 pieces"),
    "piece": (replace(A, chunks=(Chunk(range(4), range(2), block(8, 32, 0, 1)),)), "at least one row"),
    "beyond": (replace(A, chunks=(Chunk(range(4), range(2), block(1 << 20, 32, 4, 1)),)), "lie beyond the 1048576 bytes"),
    "file": (
        replace(A, chunks=(Chunk(range(4), range(2), replace(block(8, 32, 4, 1), file="rank-00001.safetensors")),)),
        "not a file",
    ),
    "state": (replace(A, chunks=(Chunk(range(4), range(2), replace(block(8, 32, 4, 1), file="state.json")),)), "not a file"),
    "shape": (replace(A, shape=(2**40, 2**40), chunks=()), "beyond 64 bits"),
    "key": (replace(A, key="a\n", of="a\n"), "printable"),
    "of": (replace(A, of="b"), "belongs to itself"),
    "owner": (replace(A, kind="table_state", of="b", key="b.exp_avg"), "optimizer state of 'b', which is no table weight"),
    "updates": (replace(A, updates=(Update(range(2), block(100, 0, 1, 0), block(100, 0, 1, 0)),)), "updates and nothing below"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_entry_that_cannot_be_is_neither_read_nor_written(name: str) -> None:
    entry, says = WRONG[name]
    with pytest.raises(CheckpointError, match=f"this cannot be saved: tensor .*{says}"):
        manifest_of(entry).to_bytes()
    data = {"format": FORMAT, **manifest_of(entry)._to_json()}
    data["checksum"] = manifest_module._checksum(data)
    with pytest.raises(CheckpointError, match=f"^m: tensor .*{says}"):
        Manifest.parse(json.dumps(data).encode(), "m")


def test_the_entry_that_the_wrong_ones_were_made_from_is_right() -> None:
    made = manifest_of(A)
    assert Manifest.parse(made.to_bytes(), "m") == made


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": {"../rank-00000.safetensors": File(1 << 20), "state.json": File(2)}}, "no other file is read"),
        ({"files": {"rank-0.pt": File(1 << 20), "state.json": File(2)}}, "file name 'rank-0.pt' is neither"),
        ({"files": {"rank-00000.safetensors": File(1 << 20)}}, "not a file"),
        ({"state": replace(STATE, bytes=3)}, "not hashed"),
        ({"state": replace(STATE, file="rank-00000.safetensors")}, "must be in state.json"),
        ({"base": Base("../step-0000000001", HASH)}, "must be a folder named step-"),
        ({"base": Base("step-0000000001\n", HASH)}, "must be a folder named step-"),
        ({"base": Base("step-000000000\u0661", HASH)}, "must be a folder named step-"),
        ({"base": Base("step-0000000001", HASH[1:])}, "hexadecimal"),
        ({"created": "\x1b[31m"}, "not printable"),
        ({"versions": {"torch": "\n"}}, "not printable"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        manifest_of(A, **changes).to_bytes()


def test_tens_of_thousands_of_chunks_are_read() -> None:
    rows = 30_000
    chunks = tuple(Chunk(range(i, i + 1), range(4), block(8 + 16 * i, 16, 1, 1)) for i in range(rows))
    entry = Entry("a", "table", "a", (rows, 4), torch.float32, chunks)
    made = manifest_of(entry, size=8 + 16 * rows)
    assert Manifest.parse(made.to_bytes(), "m") == made
    twice = replace(entry, chunks=(*chunks[:-1], chunks[0]))
    with pytest.raises(CheckpointError, match=r"rows of columns 0 to 3 from 0 on are in no chunk, or in two"):
        manifest_of(twice, size=8 + 16 * rows).to_bytes()


def test_changes_find_what_they_stand_on(tmp_path: Path) -> None:
    below, folder = tmp_path / "step-0000000001", tmp_path / "step-0000000002"
    full = small_checkpoint(below)
    changes, _ = increment(folder, below, full)
    manifests, sources = resolve(changes, folder)
    assert manifests == {folder: changes, below: full}
    user, item, bias = sources["user.weight"], sources["item.weight"], sources["tower.0.bias"]
    assert (user.chunks_in, user.chunks) == (below, full.entries["user.weight"].chunks)
    assert (user.updates_in, user.updates) == (folder, changes.entries["user.weight"].updates)
    assert (item.chunks, item.updates) == (full.entries["item.weight"].chunks, ())
    assert (bias.chunks_in, bias.chunks, bias.updates) == (folder, changes.entries["tower.0.bias"].chunks, ())
    assert {key: source.entry for key, source in sources.items()} == changes.entries


def test_changes_to_another_checkpoint_are_refused(tmp_path: Path) -> None:
    below, folder = tmp_path / "step-0000000001", tmp_path / "step-0000000002"
    changes, _ = increment(folder, below, small_checkpoint(below))
    writer = Writer(tmp_path / "step-0000000003")
    writer.add("user.weight", numbered(50, 6))
    other = writer.write()
    stands = "step-0000000002 holds changes since"
    with pytest.raises(CheckpointError, match=f"{stands} step-0000000003, and .* is another checkpoint than that"):
        resolve(replace(changes, base=Base("step-0000000003", full_checksum(below))), folder)
    with pytest.raises(CheckpointError, match=f"{stands} step-0000000003, which has no 'user.weight.exp_avg' of"):
        resolve(replace(changes, base=Base("step-0000000003", other.checksum)), folder)
    with pytest.raises(CheckpointError, match=f"{stands} step-0000000002, and .* is another"):
        resolve(replace(changes, base=Base("step-0000000002", changes.checksum)), folder)  # changes to changes
    with pytest.raises(CheckpointError, match=f"{stands} step-0000000009, which cannot be read: .*No such file"):
        resolve(replace(changes, base=Base("step-0000000009", HASH)), folder)


def full_checksum(folder: Path) -> str:
    return read_manifest(folder).checksum


def test_an_update_is_named_by_its_part_of_the_table() -> None:
    assert update_names("u", range(0, 100), range(4), 100) == ("u[0:100,0:4].ids", "u[0:100,0:4].values")
    assert update_names("u", range(1, 100, 3), range(4), 100) == ("u[1::3,0:4].ids", "u[1::3,0:4].values")
