"""Data that change between two passes: no row of a changed block is given out, and what data are known by sees their order."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from shardembed.comm.comm import Comm
from shardembed.errors import DataError
from shardembed.recipes import config
from shardembed.recipes.data import fingerprint, kept
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.fingerprint import Fingerprint, FirstPass, Seen, fingerprint_of, held_to
from shardembed.recipes.data.source import Chunk, concatenate
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.task import Task
from shardembed.recipes.tasks import prepare

ROWS = 300


def chunk_of(users: Any, items: Any, times: Any = None) -> Chunk:
    return Chunk(np.array(users, np.int64), np.array(items, np.int64), times=None if times is None else np.array(times, np.int64))


def by_the_definition(columns: list[list[int]]) -> int:
    """The fingerprint with Python's own integers, value by value."""
    bits = (1 << 64) - 1

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & bits
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & bits
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & bits
        return x ^ x >> 31

    found = 0
    for row in zip(*columns, strict=True):
        words = [value & bits for value in row]
        total = sum((word ^ word >> 32) * (mixed(place) | 1) for place, word in enumerate(words, 1)) & bits
        found = (found * 0x9E3779B97F4A7C15 + mixed(total)) & bits
    return found


int64s = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(st.tuples(int64s, int64s), max_size=40), st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 7))
def test_a_fingerprint_does_not_depend_on_how_rows_are_cut(rows: list[tuple[int, int]], cuts: list[int], piece: int) -> None:
    chunk = chunk_of([user for user, _ in rows], [item for _, item in rows])
    expected = by_the_definition([chunk.users.tolist(), chunk.items.tolist()])
    assert (Fingerprint.of(chunk).rows, Fingerprint.of(chunk).value) == (len(rows), expected)
    parts, start, size, before = [FirstPass(), FirstPass()], 0, fingerprint.BLOCK_ROWS, len(rows) // 3
    try:
        fingerprint.BLOCK_ROWS = piece  # a fixture would be made once for all examples
        for part, end in zip(parts, (before, len(rows)), strict=True):
            turn = 0
            while start < end:
                stop = min(end, start + cuts[turn % len(cuts)])
                part.see(chunk[start:stop])
                start, turn = stop, turn + 1
        assert fingerprint_of(part.seen for part in parts) == Fingerprint(len(rows), expected)
        assert [Seen.from_json(part.seen.to_json()).whole for part in parts] == [part.seen.whole for part in parts]
    finally:
        fingerprint.BLOCK_ROWS = size


def test_a_fingerprint_sees_order_pairing_and_values() -> None:
    users, items, times = np.arange(20_000) % 977, np.arange(20_000) % 331, np.arange(20_000)
    swapped, paired = np.arange(20_000), items.copy()
    swapped[[5, 9000]] = swapped[[9000, 5]]
    paired[[5, 9000]] = paired[[9000, 5]]
    found = [
        Fingerprint.of(one)
        for one in (
            chunk_of(users, items),
            chunk_of(items, users),
            chunk_of(users[swapped], items[swapped]),
            chunk_of(users, paired),
            chunk_of(users[::-1], items[::-1]),
            chunk_of(users[1:], items[1:]),
            chunk_of(users, items, times),
            chunk_of(users, items, times[swapped]),
        )
    ]
    assert len({one.value for one in found}) == len(found)


def test_numbers_that_are_the_same_count_as_the_same_and_missing_ones_as_others() -> None:
    def of(integers: list[list[float]], categories: list[list[int]]) -> int:
        return Fingerprint.of(Clicks(np.zeros(1, np.int8), np.array(integers, np.float32), np.array(categories, np.int64))).value

    strange = np.array([0xFFC12345], np.uint32).view(np.float32)[0]  # a NaN of other bits
    assert of([[strange, -0.0]], [[3, 4]]) == of([[np.nan, 0.0]], [[3, 4]])
    # Missing values that somebody filled in, two in one row.
    pairs = [(MISSING, MISSING), (0, 0), (MISSING, 0), (0, MISSING)]
    assert len({of([[1, 2]], [list(pair)]) for pair in pairs}) == 4
    assert len({of([list(pair)], [[1, 2]]) for pair in ((np.nan, np.nan), (0, 0), (np.nan, 0), (0, np.nan))}) == 4


def given_out(seen: Seen, read: Callable[[], Iterator[Chunk]]) -> tuple[list[int], str]:
    """The users of the rows that come, and the error."""
    found: list[int] = []
    try:
        for chunk in held_to(seen, read, "a.csv", concatenate):
            found += chunk.users.tolist()
    except DataError as error:
        return found, str(error)
    return found, ""


@pytest.mark.parametrize(
    ("users", "kept", "told"),
    [
        ([*range(25)], 25, ""),
        ([*range(12)], 10, "a.csv: there are only 12 rows, and were 25 in the first pass: "),
        ([*range(20)], 20, "a.csv: there are only 20 rows, and were 25 in the first pass: "),
        ([], 0, "a.csv: there are only 0 rows, and were 25 in the first pass: "),
        ([*range(26)], 20, "a.csv: there are more rows than the 25 of the first pass: "),
        ([*range(40)], 20, "a.csv: there are more rows than the 25 of the first pass: "),
        ([*range(10), 11, 10, *range(12, 25)], 10, "a.csv: rows 11 to 20 are not what they were in the first pass: "),
        ([*range(24), 99], 20, "a.csv: rows 21 to 25 are not what they were in the first pass: "),
    ],
)
def test_no_row_of_a_changed_block_is_given_out(users: list[int], kept: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK_ROWS", 10)
    first = FirstPass()
    first.see(chunk_of(range(25), [1] * 25))
    assert first.seen.rows == 25

    def read() -> Iterator[Chunk]:
        for start in range(0, len(users), 7):
            yield chunk_of(users[start : start + 7], [1] * len(users[start : start + 7]))

    found, said = given_out(first.seen, read)
    assert found == users[:kept]
    assert said.startswith(told) if told else not said
    assert not told or said.endswith("or begin a new run with --fresh")


def test_what_cannot_be_read_any_more_is_told_with_what_it_was() -> None:
    first = FirstPass()
    first.see(chunk_of([1], [2]))

    def read() -> Iterator[Chunk]:
        raise DataError("a.csv:3: column 'user': 'x' is not an integer")
        yield

    found, said = given_out(first.seen, read)
    assert not found
    assert said.startswith(
        "a.csv:3: column 'user': 'x' is not an integer. The first pass could read all of it: the data have changed"
    )


PAIRS = "data: {path: PATH, shuffle_buffer: BUFFER}\ntrain: {global_batch_size: 16}\n"
CLICKS = (
    "data: {path: PATH, integers: [I1], categories: [C1], shuffle_buffer: BUFFER, split: {fraction: 0.1}}\n"
    "model: {kind: dlrm, embedding_dim: 4}\ntrain: {global_batch_size: 16}\n"
)


def lines_of(kind: str) -> list[str]:
    if kind == "clicks":
        return [f"{row % 2}\t{row}\t{row % 37:x}" for row in range(ROWS)]
    return ["user_id,item_id", *(f"{row % 29},{row % 37}" for row in range(ROWS))]


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "cut": lambda lines: lines[: len(lines) // 2],
    "appended": lambda lines: lines + lines[-40:],
    "swapped": lambda lines: [*lines[:-2], lines[-1], lines[-2]],
    "new id": lambda lines: [
        *lines[:-1],
        lines[-1].replace(lines[-1].split(",")[0], "99999") if "," in lines[-1] else "1\t5\tffff",
    ],
    "garbage": lambda lines: [*lines[:-1], "what?"],
}


def scanned(tmp_path: Path, kind: str, buffer: int) -> tuple[Task, Path]:
    data = tmp_path / ("data.txt" if kind == "clicks" else "data.csv")
    data.write_text("\n".join(lines_of(kind)) + "\n")
    (tmp_path / "job.yaml").write_text(
        (CLICKS if kind == "clicks" else PAIRS).replace("PATH", str(data)).replace("BUFFER", str(buffer))
    )
    return prepare(config.load(tmp_path / "job.yaml"), Comm.of()), data


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["pairs", "clicks"])
def test_an_epoch_over_a_file_that_was_changed_raises(
    tmp_path: Path, kind: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "BLOCK_ROWS", 50)
    task, data = scanned(tmp_path, kind, buffer=0)
    stream = task.stream()
    before = list(stream.parts(range(task.steps_per_epoch)))
    assert len(before) == task.steps_per_epoch
    data.write_text("\n".join(CHANGES[change](lines_of(kind))) + "\n")
    again = partial(stream.parts, range(task.steps_per_epoch, 2 * task.steps_per_epoch))
    taken = []
    with pytest.raises(DataError, match=rf"{data}(:\d+)?: .*the data have changed under the run\. Bring them back"):
        taken.extend(again())  # what came before the error stays
    assert len(taken) < len(before)  # and all of them are what they were
    for one, other in zip(taken, before, strict=False):
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one) if name != "categories")
    with pytest.raises(DataError, match="the data have changed under the run"):
        list(task.data.histories(task.data.held.users) if kind == "pairs" else task.data.held_out())
    data.unlink()
    with pytest.raises(DataError, match=rf"{data}: cannot read the file: No such file .*the data have changed under the run"):
        list(again())
    data.write_text("\n".join(lines_of(kind)) + "\n")  # brought back
    assert len(list(again())) == len(before)


@pytest.mark.parametrize("kind", ["pairs", "clicks"])
def test_a_parquet_file_that_has_other_columns_now_is_told_with_what_it_was(tmp_path: Path, kind: str) -> None:
    names, template = (["user_id", "item_id"], PAIRS) if kind == "pairs" else (["label", "I1", "C1"], CLICKS)
    data = tmp_path / "data.parquet"
    table = pa.table({name: [row % (2 + place) for row in range(ROWS)] for place, name in enumerate(names)})
    parquet.write_table(table, data)
    (tmp_path / "job.yaml").write_text(template.replace("PATH", str(data)).replace("BUFFER", "0"))
    task = prepare(config.load(tmp_path / "job.yaml"), Comm.of())
    twice = pa.Table.from_arrays([*table.columns, table.columns[-1]], names=[*names, names[-1]])
    for other in (table.drop_columns(names[-1:]), twice, table.set_column(0, names[0], [[[1]] * ROWS])):
        parquet.write_table(other, data)
        with pytest.raises(DataError, match=rf"{data}: .*\. The first pass could read all of it: the data have changed"):
            list(task.stream().parts(range(task.steps_per_epoch)))


def test_what_data_are_known_by_is_their_rows_whatever_holds_them(tmp_path: Path) -> None:
    users, items = [row % 29 for row in range(ROWS)], [row % 37 for row in range(ROWS)]

    def described(*paths: str) -> str:
        (tmp_path / "job.yaml").write_text(f"data: {{path: [{', '.join(str(tmp_path / path) for path in paths)}]}}\n")
        return prepare(config.load(tmp_path / "job.yaml"), Comm.of()).counted()

    text = ["user_id,item_id", *(f"{user},{item}" for user, item in zip(users, items, strict=True))]
    (tmp_path / "a.csv").write_text("\n".join(text) + "\n")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress("\r\n".join(text).encode()))
    parquet.write_table(pa.table({"x": users, "item_id": items, "user_id": users}), tmp_path / "c.parquet", row_group_size=7)
    (tmp_path / "d.csv").write_text("\n".join(text[:100]))
    (tmp_path / "e.csv").write_text("\n".join(text[:1] + text[100:]))
    known = {described(*paths) for paths in (["a.csv"], ["b.csv.gz"], ["c.parquet"], ["d.csv", "e.csv"])}
    assert len(known) == 1
    assert described("e.csv", "d.csv") not in known
    assert re.match("300 interactions of 29 users and 37 items, ids [0-9a-f]{8}, in the order ", known.pop())
