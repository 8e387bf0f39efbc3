"""Vocabularies: what they hold, how they are cut, files that come back as they were, and the same on any number of ranks."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import shardembed as se
from shardembed.errors import ConfigError, DataError, DtypeError, InputError
from tests.amount import exhaustive
from tests.harness import run_ranks

TEXTS = st.text(st.characters(max_codepoint=0x2FF) | st.sampled_from("\\\t\n\r\u2028\U0001f600"), max_size=6)
INTEGERS = st.integers(-5, 5) | st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(INTEGERS) | st.lists(TEXTS), st.integers(1, 3), st.none() | st.integers(1, 4), st.integers(1, 5))
def test_a_vocabulary_holds_the_most_frequent_values_in_order(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], min_count: int, max_size: int | None, chunk: int
) -> None:
    chunks = [values[start : start + chunk] for start in range(0, len(values), chunk)]
    vocabulary = se.Vocabulary.build(chunks, min_count=min_count, max_size=max_size)
    ordered = sorted(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))
    expected = [(value, count) for value, count in ordered if count >= min_count][:max_size]
    assert list(zip(vocabulary.values, vocabulary.counts, strict=True)) == expected
    assert vocabulary.other_count == len(values) - sum(count for _, count in expected)
    assert vocabulary.num_embeddings == len(expected) + 1
    rows = {value: row for row, (value, _) in enumerate(expected, 1)}
    assert vocabulary(values).tolist() == [rows.get(value, 0) for value in values]
    path = tmp_path_factory.getbasetemp() / "vocabulary.txt"
    vocabulary.save(path)
    assert se.Vocabulary.load(path) == vocabulary
    assert len(path.read_bytes().split(b"\n")) == vocabulary.num_embeddings + 1  # line n is row n


def test_lookups_keep_the_shape_and_the_kind() -> None:
    vocabulary = se.Vocabulary.build([[5, 5, 7]])
    found = vocabulary(torch.tensor([[5], [6], [7]]))
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [[1], [0], [2]]
    assert vocabulary(np.array([(1 << 64) - 1, 7], np.uint64)).tolist() == [0, 2]
    assert se.Vocabulary.build([]).num_embeddings == 1
    assert se.Vocabulary.build([])([1, 2]).tolist() == [0, 0]


def test_printing_a_vocabulary_says_its_size_and_none_of_its_values() -> None:
    assert repr(se.Vocabulary.build([np.arange(2000)])) == "Vocabulary(2,001 rows of integers)"
    assert str(se.Vocabulary.build([["hats", "shoes", "hats"]])) == "Vocabulary(3 rows of texts)"


def write_columns(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The same column in four kinds of files."""
    values = [f"0{number * number % 23}" for number in range(200)]
    text = "x,id\n" + "".join(f"1,{value}\n" for value in values) + "2,\n"
    (folder / "a.csv").write_text(text)
    (folder / "b.tsv").write_text(text.replace(",", "\t"))
    (folder / "c.csv.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(pa.table({"id": [*values, None]}), folder / "d.parquet")
    return sorted(folder.iterdir()), Counter({value: 4 * count for value, count in Counter(values).items()})


def from_files(rank: int, world_size: int, paths: list[Path]) -> se.Vocabulary:
    return se.Vocabulary.from_files(paths, "id", min_count=5, max_size=9)


def build(rank: int, world_size: int, sharing: int) -> tuple[se.Vocabulary, se.Vocabulary]:
    """The first ranks, as many as are sharing, have different shares; the others have none."""
    numbers = np.arange(1000) ** 2 % 37
    mine = numbers[rank::sharing] if rank < sharing else numbers[:0]
    texts = [f"t{number}" for number in mine.tolist()]
    return se.Vocabulary.build([mine], min_count=20), se.Vocabulary.build([texts] if texts else [], max_size=7)


@pytest.mark.parametrize("world_size", [2, exhaustive(3)])
def test_all_ranks_get_the_vocabulary_that_one_rank_gets(tmp_path: Path, world_size: int) -> None:
    paths, counts = write_columns(tmp_path)
    alone = from_files(0, 1, paths)
    assert dict(zip(alone.values, alone.counts, strict=True)).items() <= counts.items()
    assert len(alone.values) == 9
    numbers = np.arange(1000) ** 2 % 37
    expected = (
        se.Vocabulary.build([numbers], min_count=20),
        se.Vocabulary.build([[f"t{number}" for number in numbers.tolist()]], max_size=7),
    )
    assert run_ranks(world_size, from_files, paths) == [alone] * world_size
    for sharing in (world_size - 1, world_size):
        assert run_ranks(world_size, build, sharing) == [expected] * world_size


def fail(rank: int, world_size: int, path: Path) -> None:
    se.Vocabulary.from_files([path, path], "idd" if rank else "id")


def test_a_file_that_one_rank_cannot_read_ends_the_call_on_all(tmp_path: Path) -> None:
    paths, _ = write_columns(tmp_path)
    outcomes = run_ranks(2, fail, paths[0], expect_errors=True)
    assert all(outcome.error is not None and "did you mean 'id'?" in str(outcome.error) for outcome in outcomes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: not a vocabulary"),
        ("\\other\t0\tnumbers\n", ":1: not a vocabulary"),
        ("\\other\t0\tintegers\n5\n", ":2: not a line of a vocabulary"),
        ("\\other\t0\tintegers\n5\t1\nx\t1\n", ":3: not a line of a vocabulary"),
        ("\\other\t0\ttexts\n\\x\t1\n", ":2: not a line of a vocabulary"),
        ("\\other\t0\ttexts\na\t1\na\t1\n", ":3: the value 'a' stands in another line"),
        ("\\other\t0\ttexts\na\t-1\n", ":2: not a line of a vocabulary"),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "v.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=f"v.txt{message}"):
        se.Vocabulary.load(path)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DtypeError, match="integers and texts"):
        se.Vocabulary.build([[1], ["a"]])
    with pytest.raises(DtypeError, match="the vocabulary has texts; convert the values to str"):
        se.Vocabulary.build([["a"]])([1])
    with pytest.raises(DtypeError, match="the vocabulary has integers; convert the values to int"):
        se.Vocabulary.build([[1]])(["a"])
    with pytest.raises(InputError, match="does not fit"):
        se.Vocabulary.build([np.array([1 << 63], np.uint64)])
    with pytest.raises(ConfigError, match="min_count must be at least 1, not 0"):
        se.Vocabulary.build([[1]], min_count=0)
    with pytest.raises(DataError, match=r"No such file"):
        se.Vocabulary.from_files(tmp_path / "absent.csv", "id")
    with pytest.raises(DataError, match=r"the suffix tells no known format"):
        se.Vocabulary.from_files(tmp_path / "absent.txt", "id")
