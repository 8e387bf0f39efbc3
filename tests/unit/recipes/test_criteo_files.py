"""Files of the Criteo layout: what is written is read, in all formats; bad rows are named or counted; none is lost or twice."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.errors import DataError
from shardembed.recipes.ctr_config import CtrDataConfig, PlantedConfig
from shardembed.recipes.data import text
from shardembed.recipes.data.clicks.rows import Clicks, concatenate
from shardembed.recipes.data.clicks.scan import ClickData, Counted
from shardembed.recipes.data.clicks.sources import open_files
from shardembed.recipes.data.clicks.split import Split
from shardembed.recipes.data.criteo.planted import PlantedClicks, write
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.fingerprint import FirstPass, Seen
from shardembed.recipes.data.stream import rank_slice
from shardembed.recipes.data.wanted import MISSING

SCHEMA = Schema("label", ("I1", "I2"), ("C1", "C2", "C3"))
GOOD = ["1\t5\t-3\t0a\tffffffff\t1", "0\t\t7\t\t\t68fd1e64", "0\t0\t\tABCDEF\t0\t"]
BAD = {
    "2\t1\t1\ta\ta\ta": "column 'label' (field 1): '2' is no label, which is 0 or 1",
    "\t1\t1\ta\ta\ta": "column 'label' (field 1): a missing value is no label",
    "1\t1.5.\t1\ta\ta\ta": "column 'I1' (field 2): '1.5.' is no number; leave missing ones empty",
    "1\t1\t0x1f\ta\ta\ta": "column 'I2' (field 3): '0x1f' is no number",
    "1\t1\t 1\ta\ta\ta": "column 'I2' (field 3): ' 1' is no number",
    "1\t1\t1\txy\ta\ta": "column 'C1' (field 4): 'xy' is no category, which is 1 to 8 hexadecimal digits",
    "1\t1\t1\ta\ta\t123456789": "column 'C3' (field 6): '123456789' is no category",
    "1\t1\t1\ta\ta": "5 field(s), but a row has 6: the label, 2 integers and 3 categories, with a tab between two",
    "1\t1\t1\ta\ta\ta\t": "7 field(s), but a row has 6",
    "1\t1\t1\ta\ta\t\u00e9": "column 'C3' (field 6): '\u00e9' is no category",
}


def read(*paths: Path | str, skip: bool = False, schema: Schema = SCHEMA) -> Clicks:
    columns = {"label": schema.label, "integers": schema.integers, "categories": schema.categories}
    config = CtrDataConfig.model_validate({**columns, "on_bad_row": "skip" if skip else "raise"})
    files = open_files(config, tuple(str(path) for path in paths))
    chunks = [clicks for part in range(len(files.parts)) for clicks in files.chunks(part)]
    dropped = sum((clicks.dropped for clicks in chunks[1:]), chunks[0].dropped)
    found = concatenate(chunks)
    return Clicks(found.labels, found.numbers, found.ids, dropped=dropped)


def same(found: Clicks, expected: Clicks) -> None:
    for one, other in zip(
        (found.labels, found.numbers, found.ids),
        (expected.labels, expected.numbers, expected.ids),
        strict=True,
    ):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def planted(rows: int) -> tuple[Clicks, Schema]:
    schema = Schema.of(CtrDataConfig())
    source = PlantedClicks(PlantedConfig(rows=rows, max_cardinality=50), schema)
    return concatenate([clicks for part in range(len(source.parts)) for clicks in source.chunks(part)]), schema


@pytest.mark.parametrize("suffix", [".tsv", ".txt.gz", ".parquet"])
def test_what_was_written_is_read(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BLOCK_BYTES", 10_000)
    clicks, schema = planted(700)
    assert 0 < np.isnan(clicks.numbers).mean() < 0.1
    assert 0 < (clicks.ids == MISSING).mean() < 0.1
    for number, rows in enumerate((slice(0, 300), slice(300, 301), slice(301, 700))):
        assert write(tmp_path / f"day_{number}{suffix}", [clicks[rows]], schema) == len(clicks[rows])
    same(read(tmp_path / "day_*", schema=schema), clicks)
    same(read(tmp_path / f"day_2{suffix}", tmp_path / "day_[01]*", schema=schema), concatenate([clicks[301:], clicks[:301]]))


def test_values_are_what_the_text_says(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\r\n".join([*GOOD, "", ""]))
    found = read(path)
    assert found.labels.tolist() == [1, 0, 0]
    np.testing.assert_array_equal(found.numbers, np.array([[5, -3], [np.nan, 7], [0, np.nan]], np.float32))
    assert found.ids.tolist() == [[10, 0xFFFFFFFF, 1], [MISSING, MISSING, 0x68FD1E64], [0xABCDEF, 0, MISSING]]


@pytest.mark.parametrize(("line", "message"), BAD.items())
@pytest.mark.parametrize("packed", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_bad_row_is_named_with_file_and_line_or_skipped(
    tmp_path: Path, line: str, message: str, packed: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "a.txt"
    data = "\n".join([*GOOD, line, *GOOD]).encode()
    path.write_bytes(packed(data))
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:4: {message}")
    found = read(path, skip=True)
    path.write_text("\n".join([*GOOD, *GOOD]))
    same(found, read(path))
    assert len(found.dropped) == 1


def test_any_mixture_of_rows_gives_the_good_ones_and_counts_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    path = tmp_path / "a.txt"
    for _ in range(60):
        monkeypatch.setattr(text, "BLOCK_BYTES", rng.choice([20, 100, 5000]))
        monkeypatch.setattr(text, "PIECE_BYTES", rng.choice([30, 300]))
        lines = [rng.choice([*GOOD, *GOOD, "", *BAD]) for _ in range(rng.randrange(1, 60))]
        good = [line for line in lines if line in GOOD]
        bad = [number for number, line in enumerate(lines, 1) if line in BAD]
        path.write_text("\n".join([GOOD[0], *lines]) + rng.choice(["", "\n"]), newline="")
        found = read(path, skip=True)
        assert len(found.dropped) == len(bad)
        assert [place.split(":")[1] for place in found.dropped.places] == [str(number + 1) for number in bad[:5]]
        path.write_text("\n".join([GOOD[0], *good]))
        same(found, read(path))


def test_a_bad_row_of_a_parquet_file_is_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    columns = {"label": [1, 0, 1, 5], "I1": [1.0, None, 3.0, 4.0], "I2": [1, 2, None, 4]}
    categories = {"C1": ["a", "zz", None, "b"], "C2": [1, 2, None, -4], "C3": pa.array(["a", "", "b", "a"]).dictionary_encode()}
    parquet.write_table(pa.table({**columns, **categories}), path)
    with pytest.raises(DataError, match=r"a.parquet: row 1 \(from 0\), column 'C1': 'zz' is no category"):
        read(path)
    found = read(path, skip=True)
    assert found.labels.tolist() == [1, 1]
    np.testing.assert_array_equal(found.numbers, np.array([[1, 1], [3, np.nan]], np.float32))
    assert found.ids.tolist() == [[10, 1, 10], [MISSING, MISSING, 11]]
    assert found.dropped.kinds == {"no label": 1, "no category": 1}


TEXTS = ["0a", "", "ffffffff", "0a"]
TYPES = {
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([text.encode() for text in TEXTS]),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of large strings": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "integers": pa.array([10, None, 0xFFFFFFFF, 10], pa.uint32()),
    "dictionary of integers": pa.array([10, None, 0xFFFFFFFF, 10]).dictionary_encode(),
}


@pytest.mark.parametrize("kind", TYPES)
def test_categories_are_read_from_every_type_of_arrow(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    numbers = pa.array([Decimal(1), None, Decimal(3), Decimal(4)], pa.decimal128(9, 1))
    parquet.write_table(pa.table({"label": [1, 0, 1, 0], "I1": numbers, "C1": TYPES[kind]}), path)
    found = read(path, schema=Schema("label", ("I1",), ("C1",)))
    assert found.ids[:, 0].tolist() == [10, MISSING, 0xFFFFFFFF, 10]
    np.testing.assert_array_equal(found.numbers[:, 0], np.array([1, np.nan, 3, 4], np.float32))


def packed_tar() -> bytes:
    packed, data = io.BytesIO(), "\n".join(GOOD).encode()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        member = tarfile.TarInfo("train.txt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"label\tI1\tI2\tC1\tC2\tC3\n1\t1\t1\t1\t1\t1\n", "a.txt:1: .*files of this layout have no header line"),
        ("a.txt", b"1,2,3\n", r"a.txt:1: 1 field\(s\), but a row has 6: [^;]*$"),
        ("a.csv", b"1,2,3,a,b,c\n", "a.csv:1: .* with a tab between two; this one has commas there: replace them, or write"),
        ("a.txt", b"1 2 3 a b c\n", "this one has blanks there"),
        ("a.zip", b"PK\x03\x04rest", "a.zip: is a zip archive; unpack it"),
        ("a.txt", bz2.compress(GOOD[0].encode() * 9)[:-9], "a.txt: cannot read on at line 1: .*is the file whole"),
        ("a.txt", lzma.compress(GOOD[0].encode() * 9)[:-9], "a.txt: cannot read on at line 1: .*is the file whole"),
        ("a.txt", b"PAR1rest", "a.txt: is a Parquet file; give it the suffix .parquet"),
        ("a.txt", GOOD[0].encode("utf-16"), "a.txt: is UTF-16; convert it to UTF-8"),
        ("a.tar.gz", packed_tar(), "a.tar.gz: is a tar archive; unpack it"),
        ("a.txt.gz", gzip.compress(GOOD[0].encode() * 9, mtime=0)[:-9], "a.txt.gz: cannot read"),
        ("a.parquet", b"1\t1\n", "a.parquet: cannot read the file"),
        ("b.txt", None, "b.txt: cannot read the file: No such file"),
        ("none*.txt", None, r"data.path: no file matches .*none\*"),
        ("", None, "is a folder without a data file"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("bad", [[], ["1\t2"]])
def test_a_byte_order_mark_is_no_part_of_the_first_label(tmp_path: Path, bad: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join([*GOOD, *bad]), encoding="utf-8-sig")
    assert read(path, skip=True).labels.tolist() == [1, 0, 0]


def test_a_column_without_any_value_is_missing_in_every_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    large = pa.array([(1 << 63) - 1, 1 << 63], pa.uint64())
    columns = {"label": [1, 0], "I1": pa.nulls(2), "I2": [1, 2], "C1": ["a", "b"], "C2": pa.nulls(2), "C3": large}
    parquet.write_table(pa.table(columns), path)
    with pytest.raises(
        DataError, match=r"row 1 \(from 0\), column 'C3': 9223372036854775808 is no category: integers must be above"
    ):
        read(path)
    found = read(path, skip=True)
    np.testing.assert_array_equal(found.numbers, np.array([[np.nan, 1]], np.float32))
    assert found.ids.tolist() == [[10, MISSING, (1 << 63) - 1]]


def test_a_column_that_is_missing_is_named_with_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"Label": [1], "I1": [1], "I2": [1], "C1": [1], "C2": [1], "C3": [1.5]}), path)
    with pytest.raises(DataError, match=r"no column 'label' \(data.label\); did you mean 'Label'\?"):
        read(path)
    with pytest.raises(DataError, match=r"no column 'C4' \(data.categories\); did you mean 'C3'"):  # C1 is read already
        read(path, schema=Schema("Label", SCHEMA.integers, ("C1", "C2", "C4")))
    with pytest.raises(DataError, match=r"column 'C3' \(data.categories\) holds double"):
        read(path, schema=Schema("Label", SCHEMA.integers, SCHEMA.categories))
    with pytest.raises(DataError, match="is named twice"):
        read(path, path, schema=Schema("Label", ("I1",), ("C1",)))


class Numbered:
    """A source whose rows carry their number."""

    name = "numbered"
    parts = ("a", "b", "c")

    def seen(self) -> tuple[Seen, ...]:
        passes = [FirstPass() for _ in self.parts]
        for part, one in enumerate(passes):
            for clicks in self.chunks(part):
                one.see(clicks)
        return tuple(one.seen for one in passes)

    def chunks(self, part: int) -> list[Clicks]:
        numbers = [np.arange(*edges) for edges in ((0, 40), (40, 41), (41, 500))]
        found = []
        for low in range(0, len(numbers[part]), 17):
            rows = numbers[part][low : low + 17]
            found.append(Clicks((rows % 2).astype(np.int8), np.zeros((len(rows), 1), np.float32), rows[:, None]))
        return found


def numbers_of(batches: list[Clicks]) -> list[int]:
    return [number for batch in batches for number in batch.ids[:, 0].tolist()]


@pytest.mark.parametrize("kind", ["hash", "last"])
@pytest.mark.parametrize("buffer", [0, 64])
def test_the_ranks_batches_are_the_rows_each_once(kind: str, buffer: int) -> None:
    config = CtrDataConfig.model_validate({"split": {"kind": kind, "fraction": 0.2, "seed": 3}})
    data = ClickData(Numbered(), None, Split(config.split, 500), Counted(Numbered().seen(), 250), None)
    held = numbers_of(list(data.held_batches(32)))
    assert held == sorted(held)
    assert [numbers.tolist() for numbers in data.held_numbers(32)] == [numbers_of([one]) for one in data.held_batches(32)]
    assert (len(held), 500 - len(held)) == (data.test_rows, data.training_rows)
    assert held == list(range(400, 500)) if kind == "last" else 60 < len(held) < 140
    epochs = [list(data.batches(32, buffer, 0, epoch)) for epoch in range(2)]
    for batches in epochs:
        assert sorted(numbers_of(batches) + held) == list(range(500))
        assert [len(batch) for batch in batches[:-1]] == [32] * (len(batches) - 1)
        for ranks in (2, 3, 4):
            parts = [rank_slice(batch, rank, ranks) for batch in batches for rank in range(ranks)]
            assert numbers_of(parts) == numbers_of(batches)
    assert (numbers_of(epochs[0]) == numbers_of(epochs[1])) == (buffer == 0)


def test_a_category_of_two_lines_is_none(tmp_path: Path) -> None:
    path = tmp_path / "clicks.parquet"
    columns = {"label": [1, 0], "I1": [1, 2], "I2": [1, 2], "C1": ["a", "ab\ncd"], "C2": ["a", "b"], "C3": ["a", "b"]}
    parquet.write_table(pa.table(columns), path)
    with pytest.raises(DataError, match=r"row 1 \(from 0\), column 'C1': 'ab\\ncd' is no category"):
        read(path)
    assert read(path, skip=True).labels.tolist() == [1]
