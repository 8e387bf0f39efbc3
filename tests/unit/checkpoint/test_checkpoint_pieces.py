"""Tensor files: what is written comes back bit for bit, other readers read it too, and nothing altered is ever copied."""

from __future__ import annotations

import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from safetensors import safe_open

from shardembed.checkpoint.format import files as files_module
from shardembed.checkpoint.format import pieces
from shardembed.checkpoint.format.blocks import Chunk, Entry, chunk_name
from shardembed.checkpoint.format.manifest import Manifest, read_manifest
from shardembed.checkpoint.format.pieces import Copy, Files, Part, read_ids, read_state, run_copies, write_file
from shardembed.checkpoint.format.verify import verify
from shardembed.errors import CheckpointError
from tests.amount import examples
from tests.unit.checkpoint.saved import STATE, Writer, increment, load, numbered, small_checkpoint, values

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOATS, torch.int64, torch.uint8, torch.bool)
EACH = examples(60, HealthCheck.function_scoped_fixture)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """For comparisons in which nan equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def drawn(rows: int, columns: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Any bits at all, nan among them."""
    draw = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(rows, columns, generator=draw) < 0.5
    size = rows * columns * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=draw).view(dtype).reshape(rows, columns)


def view_of(data: st.DataObject, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A view of `rows` x `columns` with some strides."""
    kind = data.draw(st.sampled_from(["plain", "strip", "every second", "transposed", "expanded"]))
    seed = data.draw(st.integers(0, 99))
    if kind == "strip":
        return drawn(rows, columns + 3, dtype, seed)[:, 2 : columns + 2]
    if kind == "every second":
        return drawn(2 * rows, columns, dtype, seed)[1::2]
    if kind == "transposed":
        return drawn(columns, rows, dtype, seed).t()
    if kind == "expanded":
        return drawn(1, columns, dtype, seed).expand(rows, columns)
    return drawn(rows, columns, dtype, seed)


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Manifest:
    """A checkpoint of whole tensors in one file, in a new folder."""
    step = folder / f"step-{len(list(folder.iterdir())):010d}"
    writer = Writer(step)
    for key, tensor in tensors.items():
        writer.add(key, tensor)
    return writer.write(step=int(step.name[-10:]))


@EACH
@given(st.data(), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.sampled_from(DTYPES)), min_size=1, max_size=4))
def test_files_are_what_the_safetensors_library_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, shapes: list[tuple[int, int, torch.dtype]]
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", data.draw(st.integers(1, 64)))
    views = {f"t{i}.weight": view_of(data, *shape) for i, shape in enumerate(shapes)}
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    blocks = write_file(path, [Part(name, view) for name, view in views.items()], {"format": "pt"})
    raw = path.read_bytes()
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(views)
        assert file.metadata() == {"format": "pt"}
        for name, view in views.items():
            read = file.get_tensor(name)
            assert (read.shape, read.dtype) == (view.shape, view.dtype)
            assert torch.equal(bits(read), bits(view))
    for name, view in views.items():
        block = blocks[name]
        assert raw[block.offset : block.offset + block.bytes] == bytes(bits(view).numpy())
        assert block.offset % view.dtype.itemsize == 0
        assert block.rows_a_piece == 1 or block.rows_a_piece * view.shape[1] * view.dtype.itemsize <= pieces.PIECE_BYTES


@EACH
@given(st.data(), st.integers(1, 40), st.integers(1, 6), st.sampled_from(DTYPES))
def test_any_rows_and_columns_arrive_in_any_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, rows: int, columns: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", data.draw(st.integers(1, 200)))
    stored = view_of(data, rows, columns, dtype)
    manifest = saved(tmp_path, {"a.weight": stored})
    folder = tmp_path / f"step-{manifest.step:010d}"
    block = manifest.entries["a.weight"].chunks[0].block
    into_dtype = data.draw(st.sampled_from([dtype, torch.float64])) if dtype in FLOATS else dtype
    into = view_of(data, rows + 4, data.draw(st.integers(1, columns)), into_dtype).clone(memory_format=torch.preserve_format)
    expected = into.clone()
    with Files(folder, manifest) as files:
        copies = []
        # Several copies into disjoint rows, as ranks that load several shards make them.
        free = data.draw(st.permutations(range(len(into))))
        for _ in range(data.draw(st.integers(1, 2))):
            first = data.draw(st.integers(0, columns - into.shape[1]))
            source: range | torch.Tensor = range(
                data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, rows)), data.draw(st.integers(1, 7))
            )
            if data.draw(st.booleans()):
                source = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), max_size=6)), dtype=torch.int64)
            count = min(len(source), len(free))
            source, targets, free = source[:count], torch.tensor(free[:count], dtype=torch.int64), free[count:]
            strip = slice(first, first + into.shape[1])
            copies.append(Copy(files, block, dtype, columns, source, strip, into, targets, "a.weight"))
            picked = source if isinstance(source, torch.Tensor) else torch.tensor(list(source), dtype=torch.int64)
            expected[targets] = stored[picked][:, strip].to(into_dtype)
        run_copies(copies, workers=data.draw(st.integers(1, 3)))
    assert torch.equal(bits(into), bits(expected))


@pytest.mark.parametrize("target", [slice(None), slice(3, 13), slice(1, 30, 3)])
def test_a_slice_of_rows_is_a_place_to_go_too(tmp_path: Path, target: slice) -> None:
    stored = numbered(64, 3)
    manifest = saved(tmp_path, {"a.weight": stored})
    into = torch.zeros(30, 5)
    rows = len(range(*target.indices(30)))
    with Files(tmp_path / "step-0000000000", manifest) as files:
        block = manifest.entries["a.weight"].chunks[0].block
        positions = torch.arange(rows).flip(0)
        ascending = Copy(files, block, torch.float32, 3, range(0, 2 * rows, 2), slice(0, 2), into[:, :2], target, "a.weight")
        descending = Copy(files, block, torch.float32, 3, positions, slice(1, 3), into[:, 3:], target, "a.weight")
        run_copies([ascending, descending])
        with pytest.raises(ValueError, match=r"do not go into 2 rows"):
            replace(ascending, into_rows=slice(0, 2))
        with pytest.raises(ValueError, match=r"do not go into"):
            replace(descending, source_rows=positions + 60)
    expected = torch.zeros(30, 5)
    expected[target, :2] = stored[0 : 2 * rows : 2, :2]
    expected[target, 3:] = stored[positions, 1:]
    assert torch.equal(into, expected)


def test_a_checkpoint_of_every_cut_loads_and_is_verified(tmp_path: Path) -> None:
    folder = tmp_path / "step-0000000001"
    manifest = small_checkpoint(folder)
    assert read_manifest(folder) == manifest
    loaded = load(folder, manifest)
    for key, tensor in values().items():
        assert torch.equal(loaded[key], tensor), key
    with Files(folder, manifest) as files:
        assert read_state(files) == STATE
    assert verify(folder) == []
    with safe_open(folder / "rank-00000.safetensors", "pt") as file:
        assert "user.weight[0:30,0:3]" in file.keys()  # noqa: SIM118 (not a mapping)
        assert file.get_tensor("tower.0.weight").shape == (2, 3, 4)


def test_only_the_pieces_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 40)  # ten rows
    manifest = saved(tmp_path, {"a.weight": numbered(100, 1)})
    folder = tmp_path / "step-0000000000"
    block = manifest.entries["a.weight"].chunks[0].block
    path = folder / block.file
    damaged = bytearray(path.read_bytes())
    for row in (25, 95):
        damaged[block.offset + 4 * row] ^= 1
    path.write_bytes(damaged)
    into = torch.zeros(100, 1)
    with Files(folder, manifest) as files:
        copy = Copy(files, block, torch.float32, 1, torch.tensor([0, 31, 19, 94 - 5]), slice(None), into, slice(0, 4), "a.weight")
        run_copies([copy])
        assert into[:4, 0].tolist() == [0, 31 * 16, 19 * 16, 89 * 16]
        for rows, says in [(range(20, 21), "rows 20 to 29"), (range(0, 100, 95), "rows 90 to 99")]:
            with pytest.raises(CheckpointError, match=rf"rank-00000.safetensors: {says} of 'a.weight' are damaged \(hash"):
                run_copies([replace(copy, source_rows=rows, into_rows=slice(0, len(rows)))])


def test_a_damaged_piece_names_its_rows_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 16)
    folder = tmp_path / "step-0000000001"
    manifest = small_checkpoint(folder)
    said = []
    for entry in manifest.entries.values():
        for chunk in entry.chunks:
            if not chunk.block.bytes:
                continue
            path = folder / chunk.block.file
            whole = path.read_bytes()
            altered = bytearray(whole)
            altered[chunk.block.offset + chunk.block.bytes - 1] ^= 0x80
            path.write_bytes(altered)
            with pytest.raises(CheckpointError) as raised:
                load(folder, manifest)
            problems = verify(folder)
            assert [problem.text for problem in problems] == [str(raised.value)]
            assert (problems[0].key, problems[0].file) == (entry.key, chunk.block.file)
            said.append(str(raised.value).split(": ", 1)[1].split(" (")[0])
            path.write_bytes(whole)
    assert said[:4] == [
        "rows 29 to 29, columns 0 to 2 of 'user.weight' are damaged",
        "rows 49 to 49, columns 0 to 2 of 'user.weight' are damaged",
        "rows 49 to 49, columns 3 to 5 of 'user.weight' are damaged",
        "rows 29 to 29, columns 0 to 2 of 'user.weight.exp_avg' are damaged",
    ]
    assert "rows 18 to 21 in steps of 3 of 'item.weight' are damaged" in said


def test_updates_give_their_rows_and_values(tmp_path: Path) -> None:
    full = small_checkpoint(tmp_path / "step-0000000001")
    folder = tmp_path / "step-0000000002"
    manifest, tensors = increment(folder, tmp_path / "step-0000000001", full)
    assert verify(folder) == []
    entry = manifest.entries["user.weight"]
    with Files(folder, manifest) as files:
        for update in entry.updates:
            for first, ids in read_ids(files, entry, update):
                assert first == 0
                into = torch.zeros(len(ids), len(update.columns))
                positions = range(len(ids))
                run_copies(
                    [Copy(files, update.values, entry.dtype, len(update.columns), positions, slice(None), into, slice(None), "k")]
                )
                assert torch.equal(into, tensors["user.weight"][ids, update.columns.start : update.columns.stop])


@pytest.mark.parametrize("ids", [[3, 3], [5, 3], [0, 50], [-1, 3]])
def test_updated_rows_must_be_ascending_rows_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    full = small_checkpoint(tmp_path / "step-0000000001")
    for size in (8, 1 << 20):  # in two pieces and in one
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        folder = tmp_path / f"step-{size:010d}"
        manifest, _ = increment(folder, tmp_path / "step-0000000001", full)
        writer = Writer(folder / "other", manifest.base)
        part = numbered(50, 6)
        writer.update("user.weight", part, torch.tensor([1, 2]), range(6))
        wrong = writer.parts["rank-00000.safetensors"]
        wrong[0] = Part(wrong[0].name, torch.tensor(ids).unsqueeze(1))
        other = writer.write()
        with (
            Files(folder / "other", other) as files,
            pytest.raises(CheckpointError, match=r"updated rows of 'user.weight' are not"),
        ):
            list(read_ids(files, other.entries["user.weight"], other.entries["user.weight"].updates[0]))


def test_more_files_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "MOST_OPEN", 3)
    writer = Writer(tmp_path / "step-0000000001")
    table = numbered(40, 2)
    writer.add("a.weight", table, [(rank, range(4 * rank, 4 * rank + 4), range(2)) for rank in range(10)])
    manifest = writer.write()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert torch.equal(load(tmp_path / "step-0000000001", manifest)["a.weight"], table)
    with Files(tmp_path / "step-0000000001", manifest) as files:
        for rank in range(10):
            with files.opened(f"rank-{rank:05d}.safetensors"):
                assert len(os.listdir("/proc/self/fd")) <= before + 3 + 2  # and the folder, and this listing
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_existing_file_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_text("precious")
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors cannot be written: File exists"):
        write_file(path, [Part("a", numbered(2, 2))], {})
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "link", [Part("a", numbered(2, 2))], {})
    assert path.read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"rank-00000.safetensors cannot be written: File too large"):
            write_file(tmp_path / "rank-00000.safetensors", [Part("a", numbered(1000, 64))], {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' is of torch.complex64"):
        write_file(tmp_path / "a.safetensors", [Part("a", torch.zeros(1, 1, dtype=torch.complex64))], {})
    with pytest.raises(CheckpointError, match="two tensors of one file are called 'a'"):
        write_file(tmp_path / "a.safetensors", [Part("a", numbered(1, 1)), Part("a", numbered(2, 2))], {})
    assert list(tmp_path.iterdir()) == []


def test_names_say_which_part_a_chunk_is() -> None:
    shape = (100, 64)
    assert chunk_name("u.weight", shape, range(100), range(64)) == "u.weight"
    assert chunk_name("u.weight", shape, range(50), range(32)) == "u.weight[0:50,0:32]"
    assert chunk_name("u.weight", shape, range(1, 100, 4), range(64)) == "u.weight[1::4,0:64]"
    assert chunk_name("u.weight", shape, range(1, 50, 4), range(64)) == "u.weight[1:50:4,0:64]"
    assert chunk_name("u.scale", (), range(1), range(1)) == "u.scale"


def test_a_boolean_is_never_more_than_one(tmp_path: Path) -> None:
    # The hash is right, so only a hostile writer makes this; torch's kernels rely on 0 and 1.
    writer = Writer(tmp_path / "step-0000000001")
    writer.add("mask", torch.tensor([2, 0, 255], dtype=torch.uint8))
    written = writer.write()
    entry = written.entries["mask"]
    block = entry.chunks[0].block
    into = torch.zeros(3, 1, dtype=torch.bool)
    with Files(tmp_path / "step-0000000001", written) as files:
        run_copies([Copy(files, block, torch.bool, 1, range(3), slice(None), into, slice(None), "mask")])
    assert into.view(torch.uint8)[:, 0].tolist() == [1, 0, 1]


def test_entries_count_their_bytes() -> None:
    entry = Entry("a", "dense", "a", (2, 3, 4), torch.float64, (Chunk(range(2), range(12), None),))  # type: ignore[arg-type]
    assert (entry.rows, entry.columns, entry.nbytes) == (2, 12, 192)
    assert (Entry("a", "dense", "a", (), torch.int64).rows, Entry("a", "dense", "a", (), torch.int64).columns) == (1, 1)
