"""Colours of a map: values by id or by name, categories and scales, and what of a file of metadata is refused."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pytest
import torch
from pyarrow import csv, parquet

import shardembed as se
from shardembed.cli import main
from shardembed.embeddings import metadata
from shardembed.embeddings.metadata import metadata_of
from shardembed.errors import ConfigError, DataError
from tests.unit.checkpoint.saved import Writer

STEP = "step-0000000001"
IDS = torch.tensor([3, 5, 8, 13])
WANTED = ("a", None, "b", "c")


def written(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=2)
    else:
        parse = csv.WriteOptions(delimiter="\t" if ".tsv" in path.name else ",")
        csv.write_csv(table, path, parse)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
    return path


@pytest.mark.parametrize("name", ["m.csv", "m.tsv", "m.tsv.gz", "m.parquet"])
@pytest.mark.parametrize("kind", ["integers", "floats", "texts", "hashes", "names"])
def test_values_are_found_by_any_key(tmp_path: Path, name: str, kind: str) -> None:
    lines, values = [8, 1, 3, 13, None, 5], ["b", "x", "a", "c", "x", None]
    texts = {3: "tee", 5: "oolong", 8: "tee, green", 13: "sencha", 1: "cola"}
    keys: Any = [None if line is None else texts[line] for line in lines]
    names = texts if kind == "names" else None
    ids = torch.from_numpy(se.hash64([texts[row] for row in IDS.tolist()])) if kind == "hashes" else IDS
    if kind in ("integers", "texts", "floats"):
        keys = pa.array(lines, {"integers": pa.int32(), "floats": pa.float64(), "texts": pa.int64()}[kind])
        keys = keys.cast(pa.string()) if kind == "texts" else keys
        if kind == "floats" and not name.endswith(".parquet"):
            return  # in a text file they are not told from texts
    path = written(tmp_path / name, key=keys, other=list(range(6)), genre=values)
    for key in (None, "key"):
        found = metadata_of(path, "genre", ids, names, key)
        assert (found.values, found.numbers) == (WANTED, False)


def test_a_file_is_read_in_blocks_and_twins_share_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "BLOCK_ROWS", 7)
    rows = list(range(1000))
    path = written(tmp_path / "m.parquet", row=rows, size=[row / 2 for row in rows])
    ids = torch.arange(0, 1000, 37)
    found = metadata_of(path, "size", ids)
    assert found.numbers
    assert found.values == tuple((ids / 2).tolist())
    names = {3: "one", 5: "one", 8: "two", 13: "three"}
    path = written(tmp_path / "n.csv", name=["one", "two", "three"], size=[1, 2, 3])
    assert metadata_of(path, "size", IDS, names).values == ("1", "1", "2", "3")


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([str(number) for number in range(9)], True),
        ([str(number % 8) for number in range(9)], False),
        ([*map(str, range(8)), "x"], False),
        ([*map(str, range(8)), "nan"], False),
        ([1e-3 * number for number in range(9)], True),
        ([number % 2 == 0 for number in range(9)], False),
        ([*range(8), None], False),
    ],
)
def test_numbers_are_a_scale_and_few_of_them_categories(tmp_path: Path, values: list[Any], numbers: bool) -> None:
    path = written(tmp_path / "m.parquet", key=list(range(9)), value=values)
    assert metadata_of(path, "value", torch.arange(9)).numbers is numbers


def test_what_of_metadata_cannot_be_used_is_told(tmp_path: Path) -> None:
    good = {"id": [3, 5], "genre": ["a", "b"]}
    files = {
        "m.xlsx": (None, {}, "the suffix tells no known format"),
        "absent.csv": (None, {}, "No such file"),
        "m.csv": (good, {"column": "gener"}, r"there is no column 'gener'; did you mean 'genre'\? The columns are: id, genre"),
        "k.csv": (good, {"key": "sku"}, "there is no column 'sku'"),
        "twice.csv": ({"id": [3, 3], "genre": ["a", "b"]}, {}, "3 has two values in column 'genre', 'a' and 'b'; leave one"),
        "others.csv": ({"id": [4, 6], "genre": ["a", "b"]}, {}, "for any of the 4 rows drawn. Keys in the first column are 4, 6"),
        "empty.parquet": ({"id": [3, 5], "genre": pa.array([None, ""])}, {}, "no line has a value in column 'genre'"),
        "lists.parquet": ({"id": [3, 5], "genre": [["a"], ["b"]]}, {}, r"column 'genre' holds list<.*>; name one with a text or a"),
        "keys.parquet": ({"id": [3.5, 5], "genre": ["a", "b"]}, {}, "numbers that are no ids"),
        "torn.parquet": (None, {}, "cannot read the file"),
    }
    (tmp_path / "m.xlsx").write_bytes(b"")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    for name, (columns, settings, says) in files.items():
        if columns is not None:
            written(tmp_path / name, **columns)
        with pytest.raises(DataError, match=says) as told:
            metadata_of(tmp_path / name, settings.get("column", "genre"), IDS, None, settings.get("key"))
        assert str(tmp_path / name) in str(told.value)
    (tmp_path / "same.csv").write_text("id,genre,genre\n3,a,b\n")
    with pytest.raises(DataError, match="2 columns are named 'genre'"):
        metadata_of(tmp_path / "same.csv", "genre", IDS)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    writer = Writer(tmp_path / STEP)
    writer.add("model.item.weight", torch.randn(200, 4, generator=torch.Generator().manual_seed(1)))
    writer.write()
    return tmp_path


def test_a_map_has_a_legend_of_its_categories(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    genres = [f"genre <{min(row % 20, 10)}> $x^2$" for row in range(190)]
    path, out = written(table / "m.csv", id=list(range(190)), genre=genres), table / "map.svg"
    words = ["map", str(table), "--table", "item", "--metadata", str(path), "--colour", "genre", "--out", str(out), "--id", "7"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["legend"]) == 8
    assert found["legend"][0] == "genre <10> $x^2$"
    assert found["coloured"] == sum(genre in found["legend"] for genre in genres)
    said = [each.text or "" for each in ElementTree.parse(out).iter() if each.tag.endswith("text")]
    assert sum(" others (" in each for each in said) == 1
    assert "unknown (10)" in said
    assert any(each.startswith("genre <10> $x^2$ (") for each in said), "no formula is made of it"
    before = out.read_bytes()
    assert main(words) == 0
    assert out.read_bytes() == before
    shown = capsys.readouterr().out
    assert "points coloured by genre: genre <10> $x^2$" in " ".join(shown.split())
    assert max(map(len, shown.splitlines()[1:])) <= 80


@pytest.mark.parametrize("values", [range(200), [10.0**row for row in range(-99, 101)], [-1.0] * 192 + list(range(8))])
def test_a_map_of_numbers_has_a_scale(table: Path, values: Any) -> None:
    path = written(table / "m.parquet", id=list(range(200)), weight=[float(value) for value in values])
    drawn = se.table_map(table, "item", table / "map.png", metadata=path, colour="weight", names=named(table))
    assert (drawn.coloured, drawn.legend) == (200, ())
    assert (table / "map.png").read_bytes().startswith(b"\x89PNG")


def named(folder: Path) -> Path:
    path = folder / "names.txt"
    path.write_text("".join(f"{row}\n" for row in range(200)))
    return path


def test_a_colour_is_a_column_of_a_file(table: Path) -> None:
    wrong: tuple[dict[str, Any], ...] = ({"metadata": "m.csv"}, {"colour": "genre"}, {"key": "id"})
    for settings in wrong:
        with pytest.raises(ConfigError, match="give both metadata, the file, and colour, the column"):
            se.table_map(table, "item", table / "map.png", **settings)
    with pytest.raises(ConfigError, match="remote paths"):
        se.table_map(table, "item", table / "map.png", metadata="s3://bucket/m.csv", colour="genre")
    assert not (table / "map.png").exists()
