"""Rows of data files that hold no two ids: left out the same way on every pass, counted by kind, and placed."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.errors import DataError
from shardembed.recipes.data import text
from shardembed.recipes.data.bad import MAX_ID, Dropped, Problem, problem_of
from shardembed.recipes.data.files import FileInteractions
from shardembed.recipes.data.interactions import global_batches, scan
from shardembed.recipes.data.source import Chunk, concatenate

BAD_LINES = {  # what stands in a line -> the kind of its problem
    "x,5,t": "not an integer",
    "5,0x10,t": "not an integer",
    "5, 6,t": "not an integer",
    "5,\u0663,t": "not an integer",
    "5,,t": "missing",
    "-5,6,t": "negative",
    f"5,{MAX_ID + 1},t": "too large",
    f"5,{'9' * 5000},t": "too large",
    "5": "wrong number of fields",
    "5,6,t,7": "wrong number of fields",
    '5,6,"never closed': "unclosed quote",
}


def write_text(path: Path, bad: dict[int, str], rows: int = 200, end: str = "\n") -> list[tuple[int, int]]:
    """A file of good rows with `bad[line]` in place of some lines (the header is line 1); returns the good pairs."""
    lines, pairs = ["user,item,title"], []
    for row in range(rows):
        if row + 2 in bad:
            lines.append(bad[row + 2])
        else:
            pairs.append((row % 17, row % 23))
            lines.append(f'{row % 17},{row % 23},"one, two"')
    path.write_bytes((end.join(lines) + end).encode())
    return pairs


def read(path: Path) -> tuple[list[tuple[int, int]], Dropped]:
    chunks = list(FileInteractions(path, "user", "item", "skip").chunks())
    whole = concatenate(chunks)
    return list(zip(whole.users.tolist(), whole.items.tolist(), strict=True)), sum((c.dropped for c in chunks), Dropped())


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [64, 1000, 1 << 22])
def test_every_kind_of_bad_line_is_left_out_and_counted(
    tmp_path: Path, block: int, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", block)
    monkeypatch.setattr(text, "PIECE_BYTES", 200)
    bad = dict(zip(range(20, 200, 15), BAD_LINES, strict=False))
    pairs = write_text(tmp_path / "f.csv", bad, end=end)
    found, dropped = read(tmp_path / "f.csv")
    assert found == pairs
    kinds = [BAD_LINES[line] for line in bad.values()]
    assert dropped.kinds == {kind: kinds.count(kind) for kind in kinds}
    assert [place.split(": ")[0] for place in dropped.places] == [f"{tmp_path}/f.csv:{line}" for line in list(bad)[:5]]


def test_bad_lines_at_random_leave_exactly_the_good_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(1)
    for _ in range(40):
        monkeypatch.setattr(text, "BLOCK_BYTES", random.choice([50, 333, 2000, 1 << 20]))
        monkeypatch.setattr(text, "PIECE_BYTES", random.choice([30, 500]))
        bad = {line: random.choice(list(BAD_LINES)) for line in random.sample(range(2, 202), random.choice([1, 2, 90]))}
        # Two unclosed quotes in one block enclose a text of many lines, as far as anyone can tell.
        quoted = [line for line, held in bad.items() if '"' in held]
        bad.update(dict.fromkeys(quoted[1:], "x,5,t"))
        pairs = write_text(tmp_path / "f.csv", bad)
        found, dropped = read(tmp_path / "f.csv")
        assert found == pairs
        assert len(dropped) == len(bad)


def test_values_of_several_lines_stay_whole_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 100)
    path = tmp_path / "f.csv"
    path.write_text("\ufefftitle,user,item\n" + "".join(f'"of\ntwo, {row}",{row},{row + 1}\n' for row in range(50)) + "x,y,1\n")
    found, dropped = read(path)
    assert found == [(row, row + 1) for row in range(50)]
    assert dropped.places == (f"{path}:102: column 'user': 'y' is not an integer; number users and items from 0",)


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(text, "MAX_LINE", 5000)
    (tmp_path / "f.csv").write_bytes(b"user,item\n1,2\n" + b"\0" * 20_000)
    with pytest.raises(DataError, match=r"f.csv:3: a line of more than 5000 bytes is not read"):
        read(tmp_path / "f.csv")
    (tmp_path / "g.csv").write_bytes(b"\0" * 200_000)
    with pytest.raises(DataError, match=r"g.csv:1: the header cannot be read"):
        read(tmp_path / "g.csv")


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "f.csv").write_text("user,item,user\n1,2,3\n")
    with pytest.raises(DataError, match=r"there are 2 columns 'user' \(data.user\)"):
        FileInteractions(tmp_path / "f.csv", "user", "item")


@pytest.mark.parametrize("kind", ["int64", "uint64", "string"])
def test_bad_rows_of_a_parquet_file_are_left_out(tmp_path: Path, kind: str) -> None:
    users: list[int | None] = [3, None, 5, 6, 7, 8]
    items = [1, 2, MAX_ID + 1, 4, MAX_ID if kind == "uint64" else -6, 0]
    columns = {"user": users, "item": items}
    if kind == "string":
        arrays = {name: pa.array([None if value is None else f"{value:03}" for value in held]) for name, held in columns.items()}
    else:
        arrays = {name: pa.array(held, kind) for name, held in columns.items()}
    path = tmp_path / "f.parquet"
    parquet.write_table(pa.table(arrays), path)
    found, dropped = read(path)
    negative = kind != "uint64"
    assert found == [(3, 1), (6, 4), *([] if negative else [(7, MAX_ID)]), (8, 0)]
    assert dropped.kinds == {"missing": 1, "too large": 1, **({"negative": 1} if negative else {})}
    assert dropped.places[0].startswith(f"{path}: row 1 (from 0), column 'user': the value is missing")


def test_training_does_not_know_that_rows_were_left_out(tmp_path: Path) -> None:
    """The hold-out and the batches are those of a file that never had the bad rows."""
    bad = {line: held for line, held in zip(range(10, 200, 12), BAD_LINES, strict=False) if '"' not in held}
    pairs = write_text(tmp_path / "f.csv", bad)
    (tmp_path / "clean.csv").write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in pairs))
    dirty = scan(FileInteractions(tmp_path / "f.csv", "user", "item", "skip"), 0)
    clean = scan(FileInteractions(tmp_path / "clean.csv", "user", "item"), 0)
    assert (len(dirty.dropped), len(clean.dropped)) == (len(bad), 0)
    np.testing.assert_array_equal(dirty.held_rows, clean.held_rows)
    for epoch in range(2):
        first, second = (list(global_batches(data, 32, 64, 0, epoch)) for data in (dirty, clean))
        np.testing.assert_array_equal(all_of(first), all_of(second))


def all_of(chunks: list[Chunk]) -> np.ndarray:
    whole = concatenate(chunks)
    return np.stack([whole.users, whole.items])


@pytest.mark.parametrize("enough", [10, 1000])
def test_a_file_of_mostly_bad_rows_is_taken_for_the_wrong_one(tmp_path: Path, enough: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardembed.recipes.data.interactions.ENOUGH_DROPPED", enough)
    path = tmp_path / "f.csv"
    path.write_text("user,item\n1,2\n" + "a,b\n" * 40)
    expected = r"f.csv: 40 of 41 rows read hold no interaction \(40 not an integer\); .* The first: .*f.csv:3: column 'user'"
    with pytest.raises(DataError, match=expected):
        scan(FileInteractions(path, "user", "item", "skip"), 0)


def test_problems_are_judged_by_their_digits() -> None:
    for good in ("0", "007", "-0", 0, MAX_ID, "0" * 30 + "9"):
        assert problem_of(good) is None
    for bad, kind in ((None, "missing"), ("", "missing"), ("1_0", "not an integer"), (-1, "negative"), (MAX_ID + 1, "too large")):
        found = problem_of(bad)
        assert found is not None
        assert found[0] == kind


def test_counts_add_up_and_few_places_are_kept() -> None:
    first, second = (Dropped.of([Problem(kind, str(number)) for number in range(4)]) for kind in ("a", "b"))
    both = first + second + second
    assert (len(both), both.kinds, both.places) == (12, {"a": 4, "b": 8}, ("0", "1", "2", "3", "0"))
    assert str(both) == "8 b, 4 a"
