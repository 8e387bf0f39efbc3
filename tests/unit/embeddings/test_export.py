"""`export_tables` and `shardembed export`: others read what was trained, and files are whole or not there."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors import safe_open
from safetensors.torch import load_file

import shardembed as se
from shardembed.checkpoint.format import pieces
from shardembed.cli import main
from shardembed.embeddings import formats, publish
from shardembed.embeddings.compared import NOTED, Tower, Vectors, noted
from shardembed.embeddings.narrowing import narrowed
from shardembed.embeddings.stored import Block, StoredTables
from shardembed.errors import CheckpointError, ConfigError, ExportError, IdRangeError
from tests.amount import sampled
from tests.unit.checkpoint import saved
from tests.unit.checkpoint.saved import Writer, increment, numbered, small_checkpoint, values

STEP = "step-0000000001"
IDS = [49, 0, 31, 7, 31]


def exported(folder: Path, form: str, stem: str) -> dict[str, torch.Tensor]:
    """What a stranger's library reads: weight, scale, ids."""
    if form == "safetensors":
        return load_file(folder / f"{stem}.safetensors")
    if form == "npy":
        files = {"weight": f"{stem}.npy", "scale": f"{stem}.scale.npy", "ids": f"{stem}.ids.npy"}
        there = {name: folder / file for name, file in files.items() if (folder / file).exists()}
        return {name: torch.from_numpy(np.array(np.load(path, mmap_mode="r"))) for name, path in there.items()}
    table = parquet.read_table(folder / f"{stem}.parquet")
    lists = table["embedding"].combine_chunks()
    found = {"weight": torch.from_numpy(np.array(lists.flatten()).reshape(len(table), lists.type.list_size))}
    columns = {"ids": "id", "scale": "scale"}
    there = {name: table[column] for name, column in columns.items() if column in table.column_names}
    return found | {name: torch.from_numpy(column.to_numpy().copy()) for name, column in there.items()}


@pytest.mark.parametrize(("form", "block_bytes"), sampled(product(formats.FORMATS, [1, 100, 1 << 20])))
def test_whole_tables_arrive_from_every_cut(tmp_path: Path, form: Any, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 50)
    full = small_checkpoint(tmp_path / STEP)
    _, wanted = increment(tmp_path / "step-0000000002", tmp_path / STEP, full)
    done = se.export_tables(tmp_path, tmp_path / "out", format=form, block_bytes=block_bytes)
    assert (done.step, [table.name for table in done.tables]) == (2, ["user", "item"])
    assert torch.equal(exported(tmp_path / "out", form, "user")["weight"], wanted["user.weight"])
    item = exported(tmp_path / "out", form, "item")["weight"]
    assert item.dtype == (torch.bfloat16 if form == "safetensors" else torch.float32)  # the others have no bfloat16
    assert torch.equal(item.to(torch.bfloat16), wanted["item.weight"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", STEP, "step-0000000002"]


@pytest.mark.parametrize("dtype", ["stored", "float16", "int8"])
@pytest.mark.parametrize("form", formats.FORMATS)
def test_chosen_rows_come_in_ascending_order_with_their_ids(tmp_path: Path, form: Any, dtype: Any) -> None:
    small_checkpoint(tmp_path / STEP)
    done = se.export_tables(
        tmp_path / STEP, tmp_path / "out", ["user"], rows={"user": IDS}, format=form, dtype=dtype, block_bytes=60
    )
    found = exported(tmp_path / "out", form, "user")
    ids = torch.tensor([0, 7, 31, 49])
    assert torch.equal(found["ids"], ids)
    rows = values()["user.weight"][ids]
    assert (done.tables[0].rows, done.tables[0].table_rows) == (4, 50)
    if dtype == "int8":
        assert found["weight"].dtype == torch.int8
        assert found["scale"].dtype == torch.float32
        again = found["weight"].float() * found["scale"].unsqueeze(1)
        assert bool(((again - rows).abs() <= found["scale"].unsqueeze(1) / 2 * (1 + 1e-6)).all())
    else:
        assert torch.equal(found["weight"], rows.to(getattr(torch, "float32" if dtype == "stored" else dtype)))


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1, max_size=5)
)
def test_int8_is_within_half_a_scale(numbers: list[list[float]]) -> None:
    rows = torch.tensor(numbers)
    found = narrowed("t", Block(0, torch.arange(len(rows)), rows), torch.int8)
    assert found.scale is not None
    scale = found.scale.double().unsqueeze(1)
    # A scale is rounded to float32, by 2^-24 of it or, where it has no exponent left, by half the smallest float32; times 127.
    bound = scale / 2 + 127 * (scale * 2**-24 + 2.0**-150) + rows.double().abs() * 2**-22
    assert bool(((found.values.double() * scale - rows.double()).abs() <= bound).all())
    assert int(found.values.abs().max()) <= 127
    assert torch.equal(found.scale == 0, (rows.abs().amax(1) / 127) == 0)


def test_the_models_vectors_are_made_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = {
        "user": Vectors(metric="dot", tower="tower", hidden=(3,), temperature=0.5),
        "item": Vectors(metric="dot"),
    }
    monkeypatch.setattr(saved, "STATE", json.dumps({"progress": {"step": 1, **noted(vectors)}}).encode())
    tower = Tower(6, (3,))
    torch.nn.init.normal_(tower.layers[2].weight)
    writer = Writer(tmp_path / STEP)
    writer.add("user.weight", torch.randn(50, 6))
    writer.add("item.weight", torch.randn(20, 4))
    writer.add("other.weight", torch.randn(9, 4))
    for key, value in tower.state_dict().items():
        writer.add(f"tower.{key}", value, kind="dense")
    writer.write()
    done = se.export_tables(tmp_path, tmp_path / "rows")
    assert [(one.vectors, one.metric) for one in done.tables] == [("rows", None), ("rows", "dot"), ("rows", None)]
    done = se.export_tables(tmp_path, tmp_path / "model", ["user", "item"], vectors="model", block_bytes=100)
    assert [(one.vectors, one.metric) for one in done.tables] == [("model", "dot")] * 2
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(tower(exported(tmp_path / "rows", "safetensors", "user")["weight"])) * 2
    torch.testing.assert_close(exported(tmp_path / "model", "safetensors", "user")["weight"], wanted)
    with safe_open(tmp_path / "model" / "user.safetensors", "pt") as file:
        assert (file.metadata()["vectors"], file.metadata()["metric"]) == ("model", "dot")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "shown")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "user: rows as they lie in the table; the model compares other vectors, which it makes of them (through a tower, " in shown
    )
    assert "item: the vectors that the model compares, by metric dot" in shown
    with pytest.raises(ConfigError, match=r"'other' of .* does not say what its model compares, so there are only its rows"):
        se.export_tables(tmp_path, tmp_path / "none", vectors="model")
    with pytest.raises(ConfigError, match="vectors='raw' is not one of rows, model"):
        se.neighbors(tmp_path, "user", [1], vectors="raw")  # pyright: ignore[reportArgumentType]
    (near,) = se.neighbors(tmp_path, "user", [3], k=5)
    scores = wanted.double() @ wanted[3].double()
    scores[3] = -torch.inf
    assert list(near.ids) == scores.topk(5).indices.tolist()


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"user": {"metric": "near"}}, "progress.shardembed.vectors.user.metric: Input should be 'cosine' or 'dot'"),
        ([], "progress.shardembed.vectors: Input should be an object"),
        ({"user": {"metric": "dot", "tower": "tower", "hidden": [1 << 30]}}, "does not fit the model"),
        ({"user": {"metric": "dot", "tower": "tower", "hidden": [-1]}}, "hidden.0: Input should be greater than"),
        ({"user": {"metric": "dot", "tower": "none", "hidden": [3]}}, "is in the model only"),
    ],
)
def test_a_checkpoint_that_says_nonsense_of_its_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: object, expected: str
) -> None:
    monkeypatch.setattr(saved, "STATE", json.dumps({"progress": {NOTED: said}}).encode())
    writer = Writer(tmp_path / STEP)
    writer.add("user.weight", torch.randn(50, 6))
    for key, value in Tower(6, (3,)).state_dict().items():
        writer.add(f"tower.{key}", value, kind="dense")
    writer.write()
    with pytest.raises(CheckpointError, match=expected):
        se.neighbors(tmp_path, "user", [1])


def test_files_say_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_checkpoint(tmp_path / STEP)
    words = ["export", str(tmp_path), "--table", "user", "--rows", "3,10-12", "--dtype", "int8"]
    assert main([*words, "--out", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    table = found["tables"]["user"]
    assert (found["step"], found["checkpoint"], found["file_format"]) == (1, STEP, "safetensors")
    assert (table["rows"], table["table_rows"], table["columns"]) == (4, 50, 6)
    assert (table["dtype"], table["stored_dtype"], table["files"]) == ("int8", "float32", ["user.safetensors"])
    written = json.loads((tmp_path / "a" / "export.json").read_text())
    assert written == {name: value for name, value in found.items() if name != "out"}
    with safe_open(tmp_path / "a" / "user.safetensors", "pt") as file:
        assert file.metadata()["stored_dtype"] == "float32"
        assert (file.metadata()["vectors"], file.metadata()["metric"]) == ("rows", "none")
        assert sorted(file.keys()) == ["ids", "scale", "weight"]
    assert main([*words, "--out", str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-3].split()[:8] == ["user", "4", "of", "50", "6", "int8", "(was", "float32)"]
    assert "user: rows as they lie in the table; the checkpoint does not say what its model" in shown.splitlines()[-2]
    assert max(len(line) for line in shown.splitlines()[1:]) <= 80
    (tmp_path / "ids.txt").write_text("49\n\n3\n")
    np.save(tmp_path / "ids.npy", np.array([49, 3], dtype=np.uint16))
    for name in ("ids.txt", "ids.npy"):
        words = [
            "export",
            str(tmp_path),
            "--table",
            "user",
            "--rows-file",
            str(tmp_path / name),
            "--out",
            str(tmp_path / f"of-{name}"),
        ]
        assert main(words) == 0
        assert load_file(tmp_path / f"of-{name}" / "user.safetensors")["ids"].tolist() == [3, 49]


def test_a_run_is_as_good_as_its_checkpoints(tmp_path: Path) -> None:
    small_checkpoint(tmp_path / "run" / "checkpoints" / STEP)
    assert se.export_tables(tmp_path / "run", tmp_path / "out").step == 1


def refused(tmp_path: Path, **settings: Any) -> se.ShardEmbedError:
    with pytest.raises(se.ShardEmbedError) as caught:
        se.export_tables(tmp_path, tmp_path / "out", **settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == [STEP]
    return caught.value


def test_what_cannot_be_exported_is_told_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path / STEP)
    table = numbered(20, 4)
    table[7, 2], table[9, 1] = 70000.0, float("nan")
    writer.add("model.left.user.weight", table)
    writer.add("model.right.user.weight", table)
    writer.add("../../evil.weight", numbered(3, 2))
    writer.write()
    for settings, kind, says in (
        (
            {"tables": ["usr"]},
            ConfigError,
            r"table 'usr' is not in .*did you mean 'user'\?; it has model.left.user, ",
        ),
        ({"tables": ["user"]}, ConfigError, "table 'user': .* has model.left.user, model.right.user; give the whole name"),
        ({"tables": ["left.user"], "rows": {"right.user": [1]}}, ConfigError, "'right.user' is not one of the tables to export"),
        ({"rows": {"left.user": [1, 20]}}, IdRangeError, "table 'model.left.user': id 20 at position 1; its ids are 0 to 19"),
        ({"rows": {"left.user": [0.5]}}, ConfigError, "must be a list of ids, not torch.float32"),
        ({"format": "csv"}, ConfigError, "format='csv' is not one of safetensors, npy, parquet"),
        ({"dtype": "float8"}, ConfigError, r"dtype='float8' is not one of .*; did you mean 'float"),
        ({"block_bytes": 0}, ConfigError, "block_bytes=0"),
        (
            {"dtype": "float16", "block_bytes": 50},
            ExportError,
            "table 'model.left.user': 70000 in row 7, column 2 is beyond",
        ),
        ({"dtype": "int8"}, ExportError, "table 'model.left.user': nan in row 9, column 1 has no int8"),
    ):
        error = refused(tmp_path, **settings)
        assert isinstance(error, kind)
        assert error.__class__ is kind
        with pytest.raises(kind, match=says):
            raise error
    done = se.export_tables(tmp_path, tmp_path / "out", format="npy", rows={"left.user": [1], "right.user": [1]}, dtype="float16")
    assert [table.files[0] for table in done.tables] == ["model.left.user.npy", "model.right.user.npy", "_.._evil.npy"]
    with pytest.raises(ExportError, match="out exists, and is not written over"):
        se.export_tables(tmp_path, tmp_path / "out")
    with pytest.raises(ExportError, match=r"there is no folder .*nowhere"):
        se.export_tables(tmp_path, tmp_path / "nowhere" / "out")
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(ExportError, match=r"the export takes .* bytes, and 10 are free there"):
        se.export_tables(tmp_path, tmp_path / "more")


@pytest.mark.parametrize("form", formats.FORMATS)
def test_a_disk_that_fills_up_and_damage_leave_nothing(tmp_path: Path, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = small_checkpoint(tmp_path / STEP)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(formats, "sync_file", full)
        error = refused(tmp_path, format=form)
    assert isinstance(error, ExportError)
    assert "out cannot be written: No space left on device" in str(error)
    block = manifest.entries["item.weight"].chunks[0].block
    data = bytearray((tmp_path / STEP / block.file).read_bytes())
    data[block.offset] ^= 1
    (tmp_path / STEP / block.file).write_bytes(data)
    error = refused(tmp_path, format=form)
    assert isinstance(error, CheckpointError)
    assert "of 'item.weight' are damaged" in str(error)


def test_tables_of_like_names_have_files_of_their_own(tmp_path: Path) -> None:
    writer = Writer(tmp_path / STEP)
    for number, key in enumerate(("user.weight", "user.scale.weight", "a/b.weight", "a_b.weight")):
        writer.add(key, numbered(3 + number, 2))
    writer.write()
    done = se.export_tables(tmp_path, tmp_path / "out", format="npy", dtype="int8")
    assert [table.files[0] for table in done.tables] == ["user.npy", "user.scale-2.npy", "a_b.npy", "a_b-2.npy"]
    files = [name for table in done.tables for name in table.files]
    assert len(set(files)) == len(files) == len(list((tmp_path / "out").iterdir())) - 1
    assert [len(np.load(tmp_path / "out" / table.files[0])) for table in done.tables] == [3, 4, 5, 6]


def test_a_folder_that_exists_is_a_wrong_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_checkpoint(tmp_path / STEP)
    (tmp_path / "out").mkdir()
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"--out: {tmp_path / 'out'} exists, and is not written over" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_arguments_are_told_with_their_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_checkpoint(tmp_path / STEP)
    (tmp_path / "ids.txt").write_text("3\nuser\n")
    np.save(tmp_path / "half.npy", np.array([0.5]))
    one = ["--table", "user"]
    for words, says in (
        (["--rows", "3"], "name it with --table"),
        ([*one, "--rows", "3,x"], "'x' is neither an id nor a range such as 100-199"),
        ([*one, "--rows", "9-3"], "the range 9-3 must go up"),
        ([*one, "--rows", "3", "--rows-file", "x"], "give --rows or --rows-file, not both"),
        ([*one, "--rows-file", str(tmp_path / "ids.txt")], "ids.txt:2: 'user' is not an id"),
        ([*one, "--rows-file", str(tmp_path / "half.npy")], "holds float64 of shape (1,), and must hold a list of integers"),
        ([*one, "--rows-file", str(tmp_path / "none.txt")], "none.txt cannot be read: No such file"),
        ([*one, "--rows=-5"], "id -5 at position 0; its ids are 0 to 49"),
        ([*one, "--rows", str(1 << 63)], f"'{1 << 63}' is neither an id nor a range"),
        ([*one, "--rows", "50"], "id 50 at position 0; its ids are 0 to 49"),
        (["--block", "0"], "a block takes some memory"),
    ):
        assert main(["export", str(tmp_path), "--out", str(tmp_path / "out"), *words]) == 2, words
        assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def peak_growth(work: Any) -> int:
    """By how many bytes the memory of this process grows at most while `work` runs, over what it had before."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what it is now

    def line(name: str) -> int:
        found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
        return int(found.split()[1]) << 10

    before = line("VmRSS")
    work()
    return line("VmHWM") - before


def test_memory_is_bounded_by_the_block_and_not_by_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 20)
    rows = 96 << 12  # of 256 bytes: 96 MiB
    halves = [(rank, range(rank, rows, 2), range(64)) for rank in range(2)]
    writer = Writer(tmp_path / STEP)
    writer.add("user.weight", torch.ones(1, 1).expand(rows, 64), halves)
    writer.write()
    with StoredTables(tmp_path) as stored:
        assert stored.find("user").rows * 256 == 96 << 20
    settings: dict[str, Any] = {"block_bytes": 2 << 20}
    for settings["format"], settings["dtype"] in (("safetensors", "stored"), ("npy", "int8"), ("parquet", "float16")):
        out = tmp_path / settings["format"]
        se.export_tables(tmp_path, tmp_path / f"{out.name}-warm", rows={"user": range(20000)}, **settings)
        grown = peak_growth(partial(se.export_tables, tmp_path, out, **settings))
        assert grown < 16 << 20, f"{settings}: {grown:,} bytes"
