"""Interactions: the generator, files and their errors, the hold-out, and batches that do not know how many ranks there are."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from shardembed.errors import DataError
from shardembed.recipes.config import DataConfig, GeneratorConfig
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.files import FileInteractions
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.interactions import Interactions, global_batches, scan
from shardembed.recipes.data.source import Chunk, all_chunks, concatenate
from shardembed.recipes.data.stream import rank_slice
from shardembed.recipes.ids_config import InteractionIdsConfig

NUMBERED = InteractionIdsConfig(kind="numbered")
SMALL = GeneratorConfig(users=200, items=100, interactions=1000, tastes=7, seed=3)


class Listed:
    """A source of given interactions in chunks of a given size."""

    name, parts = "listed", ("listed",)

    def __init__(self, users: np.ndarray, items: np.ndarray, size: int = 100) -> None:
        self.all, self.size = Chunk(users, items), size

    def place(self, column: int, value: int) -> str:
        return self.name

    def chunks(self, part: int = 0) -> Iterator[Chunk]:
        for start in range(0, len(self.all), self.size):
            yield self.all[start : start + self.size]


def generated(size: int = 100, config: GeneratorConfig = SMALL) -> Listed:
    chunk = concatenate(list(GeneratedInteractions(config).chunks()))
    return Listed(chunk.users, chunk.items, size)


def pairs(chunk: Chunk) -> np.ndarray:
    return np.stack([chunk.users, chunk.items], 1)


def test_the_generator_is_deterministic_and_never_repeats_a_pair() -> None:
    first, again = generated().all, generated().all
    other = generated(config=SMALL.model_copy(update={"seed": 4})).all
    np.testing.assert_array_equal(pairs(first), pairs(again))
    assert not np.array_equal(pairs(first), pairs(other))
    assert len(np.unique(pairs(first), axis=0)) == len(first) == SMALL.interactions
    assert first.users.min() >= 0
    assert first.users.max() < SMALL.users
    assert first.items.max() < SMALL.items


def test_generated_users_follow_their_tastes() -> None:
    config = GeneratorConfig(users=300, items=200, interactions=4000, tastes=10)
    chunk = generated(config=config).all
    # Two items are of one taste when the same users take them: with two tastes a user, items co-occur far more than at random.
    taken = np.zeros((config.users, config.items))
    taken[chunk.users, chunk.items] = 1
    values = np.linalg.svd(taken - taken.mean(0), compute_uv=False)
    shuffled = np.random.default_rng(0).permuted(taken, axis=0)
    noise = np.linalg.svd(shuffled - shuffled.mean(0), compute_uv=False)
    assert (values[: config.tastes - 1] > 1.3 * noise[0]).all()
    assert values[config.tastes + 5] < 1.2 * noise[0]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_files_give_what_was_written(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardembed.recipes.data.text.BLOCK_BYTES", 1000)
    chunk = generated().all
    path = tmp_path / f"clicks{suffix}"
    if suffix == ".parquet":
        table = pa.table({"extra": ["x"] * len(chunk), "who": chunk.users.astype(np.int32), "what": chunk.items})
        parquet.write_table(table, path, row_group_size=700)
    else:
        sign = "," if suffix == ".csv" else "\t"
        lines = [sign.join(("extra", "who", "what"))]
        lines += [sign.join(("x", str(user), str(item))) for user, item in pairs(chunk)]
        path.write_text("\n".join(lines) + "\n")
    source = open_source(DataConfig(path=str(path), user="who", item="what", ids=NUMBERED))
    chunks = list(all_chunks(source))
    assert len(chunks) > 1 or suffix == ".parquet"
    np.testing.assert_array_equal(pairs(concatenate(chunks)), pairs(chunk))


def test_several_files_are_read_one_after_the_other_also_compressed_ones(tmp_path: Path) -> None:
    chunk = generated().all
    rows = pairs(chunk)
    (tmp_path / "day_2.csv").write_text("what,who\n" + "".join(f"{item},{user}\n" for user, item in rows[400:]))
    text = "who,what\n" + "".join(f"{user},{item}\n" for user, item in rows[:400])
    (tmp_path / "day_1.csv.gz").write_bytes(gzip.compress(text.encode()))
    source = open_source(DataConfig(path=(str(tmp_path / "day_*"),), user="who", item="what", ids=NUMBERED))
    assert source.name == f"{tmp_path}/day_* (2 files)"
    np.testing.assert_array_equal(pairs(concatenate(list(all_chunks(source)))), rows)
    found = scan(source, seed=0)
    np.testing.assert_array_equal(found.held_rows, scan(generated(), seed=0).held_rows)


def test_mistakes_in_several_files_are_placed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id\n1,2\n")
    packed = gzip.compress(b"user_id,item_id\n1,2\n3,x\n")
    (tmp_path / "b.csv.gz").write_bytes(packed)
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(b"user_id,item_id\n" + b"1,2\n" * 200_000)[:-500])
    (tmp_path / "d.csv").write_bytes(b"PK\x03\x04 and so on")

    def scanned(*names: str) -> Interactions:
        return scan(open_source(DataConfig(path=tuple(str(tmp_path / name) for name in names), ids=NUMBERED)), 0)

    with pytest.raises(DataError, match=r"b.csv.gz:3: column 'item_id': 'x' is not an integer"):
        scanned("a.csv", "b.csv.gz")
    with pytest.raises(DataError, match=r"c.csv.gz: .*; is the file whole\?"):
        scanned("a.csv", "c.csv.gz")
    with pytest.raises(DataError, match=r"d.csv: is a zip archive; unpack it"):
        scanned("d.csv")
    with pytest.raises(DataError, match=r"data.path: .*a.csv is named twice"):
        scanned("a.csv", "a.*")
    with pytest.raises(DataError, match=r"data.path: no file matches .*e\*"):
        scanned("e*")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is a folder without a data file"):
        scanned("empty")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("user,item\n1,2\n3,x\n", r"f.csv:3: column 'item': 'x' is not an integer"),
        ("user,item\n1,2\n\n3,2.5\n", r"f.csv:4: column 'item': '2.5' is not an integer"),
        ("user,item\n1,2\n-3,4\n", r"f.csv:3: column 'user': -3 is negative"),
        ("user,item\n1,2\n3,\n", r"f.csv:3: column 'item': the value is missing"),
        ("user,item\n1,2\n99999999999,1\n", r"f.csv:3: column 'user': 99999999999 is larger than"),
        ("user,item\n1,2\n3,4,5\n", r"f.csv:3: 3 field\(s\), but the header line has 2"),
        ("usr,item\n1,2\n", r"no column 'user' \(data.user\); did you mean 'usr'\? The columns are: usr, item"),
        ("", r"f.csv:1: the file is empty; the first line of a text file must have the names of its columns"),
        ("\nuser,item\n1,2\n", r"f.csv:1: the first line is empty; the first line of a text file must have the names of its"),
        ("\ufeff \r\nuser,item\n1,2\n", r"f.csv:1: the first line is empty; "),
        ("user;item\n1;2\n", r"The columns are: user;item; this header has semicolons in it, but .* a comma in a .csv file"),
        ("user\titem\n1\t2\n", r"this header has tabs in it, but .*, or name the file by what it holds"),
        ("user,itm\n1,2\n", r"The columns are: user, itm$"),
        ("user,item\n", "there are no interactions in it"),
    ],
)
def test_bad_text_files_are_placed(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "f.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=expected):
        scan(FileInteractions(path, "user", "item"), 0)


def test_a_bad_line_far_into_a_file_is_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardembed.recipes.data.text.BLOCK_BYTES", 64)
    path = tmp_path / "f.tsv"
    path.write_text("user\titem\n" + "1\t2\n" * 500 + "1\toops\n" + "1\t2\n" * 500)
    with pytest.raises(DataError, match=r"f.tsv:502: column 'item': 'oops'"):
        list(FileInteractions(path, "user", "item").chunks())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([1, None]), r"row 1 \(from 0\), column 'item': the value is missing"),
        (pa.array([1, -5]), r"row 1 \(from 0\), column 'item': -5 is negative"),
        (pa.array([1.0, 2.5]), r"row 1 \(from 0\), column 'item': '2.5' is not an integer"),
        (pa.array([1.0, float("inf")]), r"row 1 \(from 0\), column 'item': 'inf' is not an integer"),
        (pa.array([1.0, float("nan")]), r"row 1 \(from 0\), column 'item': the value is missing"),
        (pa.array([True, False]), r"column 'item' \(data.item\) holds bool; ids must be whole numbers, or texts of their digits"),
        (pa.array([[1], [2]]), r"column 'item' \(data.item\) holds list<.*>; ids must be whole numbers"),
        (pa.nulls(2), r"row 0 \(from 0\), column 'item': the value is missing"),
        (pa.array([1, 2**64 - 1], pa.uint64()), r"row 1 \(from 0\), column 'item': \d+ is larger than"),
    ],
)
def test_bad_parquet_files_are_placed(tmp_path: Path, values: pa.Array, expected: str) -> None:
    path = tmp_path / "f.parquet"
    parquet.write_table(pa.table({"user": [0, 1], "item": values}), path)
    with pytest.raises(DataError, match=expected):
        list(FileInteractions(path, "user", "item").chunks())


def test_unusable_paths_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.csv: cannot read the file: No such file"):
        FileInteractions(tmp_path / "absent.csv", "user", "item")
    with pytest.raises(DataError, match=r"the suffix '.json' tells no known format"):
        FileInteractions(tmp_path / "x.json", "user", "item")
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"x.parquet: cannot read the file"):
        FileInteractions(tmp_path / "x.parquet", "user", "item")


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=1, max_size=60), st.integers(1, 20))
def test_one_interaction_of_each_user_with_two_is_held_out(rows: list[tuple[int, int]], size: int) -> None:
    users, items = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    data = scan(Listed(users, items, size), seed=1)
    assert (data.users, data.items, data.rows) == (users.max() + 1, items.max() + 1, len(rows))
    counts = np.bincount(users)
    np.testing.assert_array_equal(data.held.users, np.flatnonzero(counts >= 2))
    np.testing.assert_array_equal(np.sort(users[data.held_rows]), data.held.owners)
    of_users = {users[row]: items[row] for row in data.held_rows}
    assert [of_users[user] for user in data.held.owners] == data.held.items.tolist()
    kept = np.delete(np.arange(len(rows)), data.held_rows)
    np.testing.assert_array_equal(pairs(concatenate(list(data.training()))), np.stack([users, items], 1)[kept])
    np.testing.assert_array_equal(data.user_counts, np.bincount(users[kept], minlength=data.users))
    np.testing.assert_array_equal(data.item_counts, np.bincount(items[kept], minlength=data.items))
    whole = scan(Listed(users, items, 1000), seed=1)
    np.testing.assert_array_equal(data.held_rows, whole.held_rows)


def test_the_held_out_place_is_uniform_and_depends_on_the_seed() -> None:
    users = np.repeat(np.arange(3000), 4)
    first, second = (scan(Listed(users, users * 0), seed).held_rows % 4 for seed in (0, 1))
    assert (np.abs(np.bincount(first) - 750) < 100).all()
    assert 0.15 < (first == second).mean() < 0.35


@pytest.fixture(scope="module")
def data() -> Interactions:
    return scan(generated(), 0)


@pytest.mark.parametrize("buffer", [0, 1, 500, 1 << 20])
def test_an_epoch_holds_every_training_row_once(data: Interactions, buffer: int) -> None:
    batches = list(global_batches(data, 64, buffer, 0, 0))
    assert {len(batch) for batch in batches[:-1]} == {64}
    assert len(batches[-1]) == (data.training_rows % 64 or 64)
    found, expected = (pairs(concatenate(chunks)) for chunks in (batches, list(data.training())))
    assert np.array_equal(found, expected) == (buffer == 0)
    order = np.lexsort(found.T), np.lexsort(expected.T)
    np.testing.assert_array_equal(found[order[0]], expected[order[1]])


def test_batches_depend_on_seed_and_epoch_alone(data: Interactions) -> None:
    def epoch(source: Interactions, seed: int, number: int) -> np.ndarray:
        return pairs(concatenate(list(global_batches(source, 64, 500, seed, number))))

    np.testing.assert_array_equal(epoch(data, 0, 0), epoch(scan(generated(size=999), 0), 0, 0))
    assert not np.array_equal(epoch(data, 0, 0), epoch(data, 0, 1))
    assert not np.array_equal(epoch(data, 0, 0), epoch(data, 1, 0))


@pytest.mark.parametrize("size", [1, 2, 63, 64])
def test_ranks_slices_make_up_the_global_batch(data: Interactions, size: int) -> None:
    for batch in global_batches(data, size, 500, 0, 0):
        for ranks in (1, 2, 3):
            parts = [rank_slice(batch, rank, ranks) for rank in range(ranks)]
            np.testing.assert_array_equal(pairs(concatenate(parts)), pairs(batch))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
