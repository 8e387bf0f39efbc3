"""The names of ids: kept whatever the order and the process, read back, and two texts on one id are told."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import shardembed as se
from shardembed.errors import DataError
from tests.unit.kernels.test_texts import MASK, P1, P2, P5, mixed_in, rotated, slow


def texts_that_collide() -> tuple[bytes, bytes]:
    """8 bytes, and 16 whose last 8 are chosen so that XXH64 comes out the same."""
    first, half = b"AAAAAAAA", b"BBBBBBBB"
    target = rotated(P5 + 8 ^ mixed_in(0, int.from_bytes(first, "little")), 27)  # all that follows is done alike
    state = rotated(P5 + 16 ^ mixed_in(0, int.from_bytes(half, "little")), 27) * P1 + 0x85EBCA77C2B2AE63 & MASK
    wanted = (rotated(target, 64 - 27) ^ state) * pow(P1, -1, 1 << 64) & MASK
    word = rotated(wanted, 64 - 31) * pow(P2, -1, 1 << 64) & MASK
    second = half + word.to_bytes(8, "little")
    assert slow(first, 0) == slow(second, 0)
    return first, second


def test_names_are_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "items.names"
    ids = se.hash64(["shoes", "hats", "shoes", None], null=-1, names=folder)
    more = se.hash64(pa.array(["hats", "gloves", None]).dictionary_encode(), null=-1, names=str(folder))
    assert se.Names(folder).texts() == {int(ids[0]): "shoes", int(ids[1]): "hats", int(more[1]): "gloves"}
    assert se.Names(folder).texts([int(more[1]), 5]) == {int(more[1]): "gloves"}
    files = sorted(folder.iterdir())
    assert len(files) == 2
    assert sorted(name for file in files for name in parquet.read_table(file)["name"].to_pylist()) == ["gloves", "hats", "shoes"]
    se.hash64(["gloves"], names=folder)
    assert sorted(folder.iterdir()) == files, "nothing new, no file"


def test_names_wait_until_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardembed.inputs.names.WAITING", 10)
    with se.Names(tmp_path / "names") as names:
        for number in range(7):
            se.hash64([f"{number}-{i}" for i in range(4)] + ["always"], names=names)
        assert len(names.texts()) == 29, "those that wait too"
        assert len(list(names.folder.iterdir())) == 2
    assert set(se.Names(names.folder).texts().values()) == {f"{n}-{i}" for n in range(7) for i in range(4)} | {"always"}
    assert names.collisions == []


def test_integers_need_no_name_but_those_beyond_64_bits_do(tmp_path: Path) -> None:
    ids = se.hash64([1, 1 << 90], names=tmp_path / "names")
    se.hash64(np.array([4, 5]), names=tmp_path / "none")
    assert se.Names(tmp_path / "names").texts() == {int(ids[1]): str(1 << 90)}
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("when", ["in one call", "later", "in another process", "beside it"])
def test_two_texts_on_one_id_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str) -> None:
    first, second = texts_that_collide()
    names = se.Names(tmp_path)
    with caplog.at_level(logging.WARNING, logger="shardembed"):
        if when == "in one call":
            se.hash64([b"x", first, second, second], names=names)
        elif when == "beside it":
            other = se.Names(tmp_path)
            for book, text in ((names, first), (other, second)):
                se.hash64([text], names=book)
                book.flush()
            assert caplog.text == ""
            names = se.Names(tmp_path)
        else:
            se.hash64([first, b"x"], names=names)
            if when == "in another process":
                names.flush()
                names = se.Names(tmp_path)
            for _ in range(2):
                se.hash64([b"x", second], names=names)
    (found,) = names.collisions
    assert (found.id, found.first) == (int(se.hash64([first])[0]), "AAAAAAAA")
    assert found.second.startswith("BBBBBBBB")
    assert f"share the id {found.id}" in caplog.text
    assert "'AAAAAAAA'" in caplog.text
    assert len(caplog.records) == 1, "once"
    names.flush()
    assert se.Names(tmp_path).texts([found.id]) == {found.id: "AAAAAAAA"}


def test_bytes_that_are_no_texts_are_shown(tmp_path: Path) -> None:
    ids = se.hash64([b"\xff\x00a", "ä".encode()], names=tmp_path)
    assert se.Names(tmp_path).texts() == {int(ids[0]): "\\xff\x00a", int(ids[1]): "ä"}


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: cannot write the names"):
        se.hash64(["a"], names=tmp_path / "file")
    (tmp_path / "x.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"x\.parquet: cannot read the names"):
        se.Names(tmp_path)
    parquet.write_table(pa.table({"id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: not a file of names: it lacks one of the columns id, check"):
        se.Names(tmp_path)


def test_a_file_that_was_not_finished_is_not_read(tmp_path: Path) -> None:
    se.hash64(["a"], names=tmp_path)
    (tmp_path / "half.new").write_text("PAR1")
    assert set(se.Names(tmp_path).texts().values()) == {"a"}
