"""Thousands of altered checkpoints: each gives the values that were saved or a CheckpointError, and never anything else.

No hang (an alarm ends the test), no memory beyond a fixed allowance (a limit on the address space), nothing written. Where an
altered manifest gets a right checksum again, the checks behind the checksum are what is tested.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import shardembed as se
from shardembed.checkpoint.format import header
from shardembed.checkpoint.format.manifest import read_manifest, resolve
from shardembed.checkpoint.format.pieces import Copy, Files, run_copies
from shardembed.checkpoint.format.verify import verify
from shardembed.cli import main
from shardembed.errors import CheckpointError
from tests.amount import exhaustive
from tests.unit.checkpoint.altered import (
    CHANGES,
    FILES,
    FULL,
    Case,
    altered,
    counted,
    limits,
    loaded,
    nodes,
    outcome,
    scramble,
    signed_again,
)
from tests.unit.checkpoint.saved import Writer, increment, small_checkpoint, values


@pytest.fixture(params=[exhaustive(FULL), CHANGES])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Case]:
    """A full checkpoint, and one with changes that stands on it. Afterwards nothing has been written but by the test."""
    root = tmp_path / "root"
    full = small_checkpoint(root / FULL)
    _, changed = increment(root / CHANGES, root / FULL, full)
    with limits():
        yield root / request.param, (values() if request.param == FULL else changed)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "outside") == ["root"]
    assert sorted(path.name for path in root.iterdir() if path.name != "other") == [FULL, CHANGES]


def test_any_bytes_of_a_manifest(case: Case) -> None:
    ends = counted(case, case[0] / "manifest.json", scramble, 600)
    assert ends["refused"] > 550, ends


def test_any_value_in_a_manifest_that_is_signed_again(case: Case) -> None:
    def alter(draw: random.Random, original: bytes) -> bytes:
        return signed_again(altered(draw, json.loads(original)))

    ends = counted(case, case[0] / "manifest.json", alter, 800, signed=case[0].name == CHANGES)
    assert ends["refused"] > 600, ends


def test_what_users_call_gives_no_other_error_either(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """`load_plain` and `shardembed inspect --verify`: a model that fits, or an error in words; an exit code of 0 or 1."""
    folder, saved = case
    path = folder / "manifest.json"
    original = path.read_bytes()
    ends = {"loaded": 0, "refused": 0}
    for seed in range(70):
        path.write_bytes(signed_again(altered(random.Random(10_000 + seed), json.loads(original))))
        model = nn.ModuleDict({"user": nn.Embedding(50, 6), "item": nn.EmbeddingBag(23, 4, dtype=torch.bfloat16)})
        try:
            se.load_plain(folder, model, rows={"item": [22, 3]} if seed % 2 else None)
            assert model.state_dict()["user.weight"].shape == saved["user.weight"].shape
            ends["loaded"] += 1
        except CheckpointError:
            ends["refused"] += 1
        assert main(["inspect", str(folder), "--verify"]) in (0, 1)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        assert all(each.isprintable() or each == "\n" for each in shown.out)
    assert ends["loaded"] > 1, ends
    assert ends["refused"] > 50, ends


def test_any_bytes_of_a_state_file(case: Case) -> None:
    ends = counted(case, case[0] / "state.json", scramble, 100)
    assert ends["refused"] > 90, ends  # the others changed nothing


def test_any_bytes_of_a_tensor_file(case: Case) -> None:
    def alter(draw: random.Random, original: bytes) -> bytes:
        if draw.random() < 0.5:
            return scramble(draw, original)
        found = bytearray(original)  # of the same length, so that the size does not tell
        length = 8 + int.from_bytes(found[:8], "little")
        for _ in range(draw.choice([1, 3])):
            found[draw.randrange(length)] = draw.randrange(256)
        return bytes(found)

    ends = counted(case, case[0] / "rank-00000.safetensors", alter, 800)
    assert ends["refused"] > 700, ends


def test_any_header_whose_manifest_was_made_to_fit(case: Case) -> None:
    """The manifest is moved along and signed again, so that only the header itself is left to object to."""
    folder, name = case[0], "rank-00000.safetensors"
    told = json.loads((folder / "manifest.json").read_bytes())
    path = folder / name
    original = path.read_bytes()
    begin = 8 + int.from_bytes(original[:8], "little")

    def alter(draw: random.Random, _: bytes) -> bytes:
        head = json.loads(original[8:begin])
        kind = draw.randrange(4)
        text = json.dumps(altered(draw, head)).encode() if kind else scramble(draw, original[8:begin])
        if kind == 1:  # a key twice
            text = text[:-1] + b", " + json.dumps(draw.choice(list(nodes(head))[1:])[0]).encode() + b': {"dtype": "U8"}}'
        length = len(text)
        if kind == 2:
            length = draw.choice([0, 1, length - 1, length + 1, 2**31, 2**63 - 1, 2**64 - 1, len(original), len(original) - 8])
        found = (length % 2**64).to_bytes(8, "little") + text + original[begin:]
        moved = json.loads(json.dumps(told))
        moved["files"][name]["bytes"] = len(found)
        for entry in moved["entries"].values():
            blocks = entry["chunks"] + [update[part] for update in entry["updates"] for part in ("ids", "values")]
            for block in blocks:
                block["offset"] += (len(text) + 8 - begin) * (block["file"] == name)
        (folder / "manifest.json").write_bytes(signed_again(moved))
        path.write_bytes(found)
        return found

    ends = {"refused": 0, "right": 0}
    for seed in range(400):
        alter(random.Random(seed), original)
        ends[outcome(case)] += 1  # the same names, dtypes and places: the same values
    assert ends["refused"] > 360, ends


def test_every_altered_byte_of_data_is_found_and_named(case: Case) -> None:
    folder, _ = case
    manifests, _ = resolve(read_manifest(folder), folder)
    where = {}  # (file, byte) -> key
    for key, entry in manifests[folder].entries.items():
        blocks = [chunk.block for chunk in entry.chunks] + [b for update in entry.updates for b in (update.ids, update.values)]
        where.update({(block.file, block.offset + i): key for block in blocks for i in range(block.bytes)})
    for number, (file, at) in enumerate(sorted(where)):
        if number % 11:
            continue
        path = folder / file
        original = path.read_bytes()
        changed = bytearray(original)
        changed[at] ^= 1 << number % 8
        path.write_bytes(changed)
        key = where[file, at]
        with pytest.raises(CheckpointError) as raised:
            loaded(folder)
        (problem,) = verify(folder)
        for text in (str(raised.value), problem.text):
            assert f"{path}: " in text
            assert f"of '{key}' are damaged (hash " in text
            assert "rows " in text
        assert (problem.file, problem.key) == (file, key)
        path.write_bytes(original)


@pytest.mark.parametrize("name", FILES)
def test_other_things_under_the_name_of_a_file(case: Case, tmp_path: Path, name: str) -> None:
    folder, _ = case
    path, outside = folder / name, tmp_path / "outside"
    original = path.read_bytes()
    outside.mkdir()
    (outside / "right").write_bytes(original)
    (outside / "secret").write_text("secret")

    def pipe() -> None:
        os.mkfifo(path)

    def listener() -> None:
        with socket.socket(socket.AF_UNIX) as server:
            here = os.open(folder, os.O_RDONLY)
            try:
                server.bind(f"/proc/self/fd/{here}/{name}")  # the whole path is longer than a socket's may be
            finally:
                os.close(here)

    others: dict[str, tuple[Callable[[], object], str]] = {
        "missing": (lambda: None, "is missing|has no manifest"),
        "link to the right file": (lambda: path.symlink_to(outside / "right"), "links are not followed"),
        "link out": (lambda: path.symlink_to("/etc/passwd"), "links are not followed"),
        "link to nothing": (lambda: path.symlink_to("/nowhere"), "links are not followed"),
        "link to itself": (lambda: path.symlink_to(path), "links are not followed"),
        "folder": (path.mkdir, "not a regular file"),
        "pipe": (pipe, "not a regular file"),
        "socket": (listener, "cannot be opened"),
        "empty": (lambda: path.write_bytes(b""), "cut short|not valid JSON"),
        "cut short": (lambda: path.write_bytes(original[:-2]), "cut short|not valid JSON"),
        "longer": (lambda: path.write_bytes(original + b"\0"), "longer than it was written|not valid JSON"),
        "torch.save": (lambda: torch.save({"a": torch.zeros(3)}, path), "cut short|longer|holds a pickle"),
        "pickle": (lambda: path.write_bytes((b"\x80\x04}." + original)[: len(original)]), "holds a pickle .* run any code"),
    }
    for what, (make, says) in others.items():
        path.unlink()
        make()
        with pytest.raises(CheckpointError, match=says):
            loaded(folder)
        if name != "manifest.json":
            found = [problem for problem in verify(folder) if problem.file == name]
            assert found, what
            assert all(str(path) in problem.text for problem in found)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(original)
    path.unlink()
    os.link(outside / "right", path)  # a second name of the same bytes is as good as the first
    assert outcome(case) == "right"
    assert (outside / "secret").read_text() == "secret"


def test_a_folder_that_is_a_link(case: Case, tmp_path: Path) -> None:
    folder, _ = case
    full = folder.parent / FULL
    shutil.move(full, tmp_path / "outside")
    full.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a symbolic link, which is not followed"):
        loaded(folder)  # the checkpoint itself, or the one that it stands on
    full.unlink()
    with pytest.raises(CheckpointError, match=f"{FULL}.*(no such|No such)"):
        loaded(folder)
    full.write_text("a file")
    with pytest.raises(CheckpointError, match="not a folder that can be opened"):
        loaded(folder)


@pytest.mark.parametrize(
    "name", ["model.pt", "optimizer.pkl", "weights.bin", "__0_0.distcp", ".metadata", "a.ckpt", "b.pth", "c.joblib"]
)
def test_a_folder_with_a_pickle_is_refused(case: Case, name: str) -> None:
    folder, _ = case
    (folder / name).write_bytes(b"\x80\x04.")
    with pytest.raises(
        CheckpointError, match=f"holds '{name}', and pickles are never read here, since reading one can run any code"
    ):
        loaded(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"has no manifest.json and holds '{name}': a pickle"):
        loaded(folder)


def test_lengths_that_lie_cost_no_memory(case: Case) -> None:
    """Signed manifests that speak of an exabyte; the files stay small, and no one asks for the memory."""
    folder, _ = case
    told = json.loads((folder / "manifest.json").read_bytes())
    entry = told["entries"]["tower.0.bias"]
    (chunk,) = entry["chunks"]
    told["files"][chunk["file"]]["bytes"] = 2**60
    chunk["bytes"], chunk["offset"], chunk["hashes"] = 2**59, 2**58, chunk["hashes"][:1]

    def shaped(rows: int, columns: int, rows_a_piece: int) -> None:
        entry["shape"], chunk["rows"], chunk["columns"] = [rows, columns], [0, rows, 1], [0, columns]
        chunk["rows_a_piece"] = rows_a_piece
        (folder / "manifest.json").write_bytes(signed_again(told))

    def read() -> None:
        manifests, _ = resolve(read_manifest(folder), folder)
        with Files(folder, manifests[folder]) as files:
            stored = files.manifest.entries["tower.0.bias"].chunks[0].block
            into = torch.zeros(1, 1)
            run_copies([Copy(files, stored, torch.float32, 2**57, range(1), slice(0, 1), into, slice(None), "tower.0.bias")])

    shaped(2**57, 1, 2**57)
    with pytest.raises(CheckpointError, match=r"pieces of .* bytes are larger than"):
        read()
    shaped(2**57, 1, 2**24)
    with pytest.raises(CheckpointError, match="1 hashes for 8589934592 pieces"):
        read()
    shaped(1, 2**57, 1)  # a single row is a piece, however long
    with pytest.raises(CheckpointError, match=r"is cut short .* it holds parts of"):
        read()
    problems = [problem.text for problem in verify(folder) if "is cut short" in problem.text]
    assert len(problems) == 1


def test_a_file_of_holes_is_hashed_in_steps(tmp_path: Path) -> None:
    """A file may be as large as it says and take no room on the disk: here more than the allowance, in a single row."""
    small = tmp_path / FULL
    writer = Writer(small)
    writer.add("a.weight", torch.zeros(1, 1))
    writer.write()
    columns = (640 << 20) // 4
    text, (begin,) = header.encode([("a.weight", torch.float32, (1, columns))], {})
    path = small / "rank-00000.safetensors"
    path.write_bytes(text)
    os.truncate(path, begin + 4 * columns)
    told = json.loads((small / "manifest.json").read_bytes())
    told["entries"]["a.weight"]["shape"] = [1, columns]
    told["files"][path.name]["bytes"] = begin + 4 * columns
    told["entries"]["a.weight"]["chunks"][0].update(columns=[0, columns], bytes=4 * columns, offset=begin, rows_a_piece=1)
    (small / "manifest.json").write_bytes(signed_again(told))
    with limits(400 << 20):
        (problem,) = verify(small)
    assert "rows 0 to 0 of 'a.weight' are damaged" in problem.text


def test_a_header_of_any_length_is_bounded_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.safetensors"
    for length in (0, 1, 2**20, 10**8, 10**8 + 1, 2**40, 2**64 - 1):
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        descriptor = os.open(path, os.O_RDONLY)
        with limits(), pytest.raises(CheckpointError, match=r"not a safetensors file|not valid JSON|where one should"):
            header.read(descriptor, 10, "rank-00000.safetensors", 1)
        os.close(descriptor)
