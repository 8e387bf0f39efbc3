"""Interactions that are kept in memory after the first pass: the same rows, within the room that there is, in one process."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from shardembed.recipes.config import DataConfig
from shardembed.recipes.data import kept, text
from shardembed.recipes.data.choose import open_numbered, open_source
from shardembed.recipes.data.kept import Kept
from shardembed.recipes.data.numbering import NOBODY, Numbers
from shardembed.recipes.data.source import all_chunks, concatenate
from shardembed.recipes.sequence_config import SequenceDataConfig


def settings(tmp_path: Path, rows: int = 500) -> DataConfig:
    lines = ["user_id,item_id", *(f"u{row % 17},{row * row % 23}" for row in range(rows))]
    for name, part in (("a.csv", lines[: rows // 2]), ("b.csv", [lines[0], *lines[rows // 2 :]])):
        (tmp_path / name).write_text("\n".join(part) + "\n")
    return DataConfig(path=(str(tmp_path / "*.csv"),))


@pytest.mark.parametrize("room", [0, 5000, 1 << 30])  # nothing, a part, all
def test_what_is_kept_is_what_was_read(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_BYTES", room)
    monkeypatch.setattr(text, "BLOCK_BYTES", 300)
    config = settings(tmp_path)
    plain = concatenate(list(all_chunks(open_source(config))))
    source, ids = open_numbered(config)
    assert ids is not None
    for _ in range(2):
        found = concatenate(list(all_chunks(source)))
        assert np.array_equal(ids.users[found.users], plain.users)
        assert np.array_equal(ids.items[found.items], plain.items)
        assert (np.diff(ids.users) > 0).all()


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tmp_path)
    for ranks, expected in (("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        monkeypatch.setattr(kept, "KEPT_BYTES", 250 * 16)  # half of the rows
        source = Kept(open_source(config))
        list(all_chunks(source))
        (tmp_path / "b.csv").rename(tmp_path / "c")
        (tmp_path / "a.csv").rename(tmp_path / "d")
        assert len([part for part in range(2) if _reads(source, part)]) == expected
        (tmp_path / "c").rename(tmp_path / "b.csv")
        (tmp_path / "d").rename(tmp_path / "a.csv")


def test_times_hold_on_to_no_more_memory_than_they_count(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id,timestamp\n1,2,3\n4,5,6\n")
    (chunk,) = all_chunks(open_source(SequenceDataConfig(path=(str(path),))))
    assert chunk.times is not None
    assert chunk.nanoseconds is None
    assert chunk.times.base is None or chunk.times.base.nbytes == chunk.times.nbytes


def _reads(source: Kept, part: int) -> bool:
    try:
        return bool(list(source.chunks(part)))
    except Exception:
        return False


def test_a_copy_in_another_process_keeps_nothing_and_reads_the_same(tmp_path: Path) -> None:
    source, _ = open_numbered(settings(tmp_path, 50_000))
    first = concatenate(list(all_chunks(source)))
    copied = pickle.dumps(source)
    assert len(copied) < 10_000 < first.nbytes
    again = concatenate(list(all_chunks(pickle.loads(copied))))
    assert np.array_equal(again.users, first.users)
    assert np.array_equal(again.items, first.items)


def test_a_pass_that_ends_early_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 300)
    source = Kept(open_source(settings(tmp_path)))
    next(source.chunks(0))
    assert sum(map(len, all_chunks(source))) == 500


def test_numbers_are_those_of_the_places_of_ids() -> None:
    ids = np.array([-(1 << 63), -5, 0, 7, (1 << 63) - 1])
    asked = np.array([[7, -5], [8, (1 << 63) - 1]])
    assert Numbers(ids)(asked).tolist() == [[3, 1], [NOBODY, 4]]
    assert Numbers(ids[:0])(asked).tolist() == [[NOBODY] * 2] * 2
