"""A first configuration from a file's columns: roles by name and content, kinds of features, and that it loads and trains."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.cli import main
from shardembed.recipes import config
from shardembed.recipes.config import Config
from shardembed.recipes.ctr_config import CtrConfig

ROWS = 600


def log(path: Path) -> None:
    draw = random.Random(0)
    genres = {item: "|".join(sorted(draw.sample(["drama", "war", "scifi"], 1 + item % 2))) for item in range(40)}
    lines = ["viewer,sku,ts,country,genres,price,title,rating,empty,same"]
    for row in range(ROWS):
        user, item = draw.randrange(30), int(40 * draw.random() ** 2)
        cells = [f"{user:08x}-aa", f"SKU-{item}", f"2024-01-{1 + row // 40:02d}T10:00:00Z", ("DE", "NA")[user % 2], genres[item]]
        lines.append(",".join([*cells, f"{1.5 + item**4}", f"The long title of {item}", str(draw.randrange(1, 6)), "", "x"]))
    path.write_text("\n".join(lines) + "\n")


def clicks(path: Path) -> None:
    draw = random.Random(0)
    lines = ["clicked\tshown_at\tuser\tad_id\ttags\tprice\tage\tzip\tplace"]
    for row in range(ROWS):
        tags = ";".join(draw.sample(["x", "y", "z"], 2))
        cells = [
            row % 3 == 0,
            1_700_000_000 + row,
            f"u{draw.randrange(30)}",
            draw.randrange(10**9),
            tags,
            draw.random(),
            18 + row % 50,
        ]
        lines.append(
            "\t".join([*(str(int(one) if isinstance(one, bool) else one) for one in cells), f"0{1000 + row}", str(row % 5)])
        )
    path.write_text("\n".join(lines) + "\n")


def film_log(path: Path) -> None:
    draw = random.Random(0)
    table = {
        "UserId": [draw.randrange(30) for _ in range(ROWS)],
        "movieId": [draw.randrange(40) for _ in range(ROWS)],
        "when": pa.array([1_700_000_000 + row for row in range(ROWS)], pa.timestamp("s")),
        "vector": [[0.1, 0.2]] * ROWS,
        "struct": [{"a": 1}] * ROWS,
    }
    tags = [["a", "b"][: 1 + item % 2] for item in table["movieId"]]
    parquet.write_table(pa.table({**table, "movie_tags": tags}), path)


def guessed(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> tuple[config.AnyConfig, str]:
    """What is written for a file, which also trains."""
    job = tmp_path / "job.yaml"
    assert main(["train", "--guess", str(data), "--out", str(job)]) == 0
    seen = capsys.readouterr().err
    assert f"{data}: the first {ROWS} rows" in seen.replace("\n", "")
    assert main(["train", "--guess", str(data)]) == 0
    assert capsys.readouterr().out == job.read_text()
    words = ["--max-steps", "2", "--set", f"run_dir={tmp_path / 'runs'}", "--set", "log.page=false"]
    assert main(["train", str(job), *words]) == 0
    capsys.readouterr()
    return config.load(job), job.read_text()


def test_a_log_of_texts_becomes_two_towers_with_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log(tmp_path / "log.csv")
    found, text = guessed(tmp_path, tmp_path / "log.csv", capsys)
    assert isinstance(found, Config)
    assert (found.data.user, found.data.item, found.data.time, found.data.split.kind) == ("viewer", "sku", "ts", "last")
    assert [(one.name, one.kind, one.of) for one in found.data.features] == [
        ("country", "id", "user"),
        ("genres", "ids", "item"),
        ("price", "number", "item"),
    ]
    assert found.data.features[1].separator == "|"
    assert found.data.features[2].scale == "log"
    for name, why in (("title", "sentences"), ("rating", "neither to a user"), ("empty", "no value"), ("same", "always the same")):
        assert f"# {name}: left out, " in text
        assert why in text
    assert "sasrec" in text


def test_a_plain_log_takes_at_most_fifteen_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{row % 30},{row * row % 41},{1_700_000_000 + row}\n" for row in range(ROWS))
    )
    found, text = guessed(tmp_path, path, capsys)
    assert isinstance(found, Config)
    assert (found.data.user, found.data.item, found.data.time) == ("user_id", "item_id", "timestamp")
    assert not found.data.features
    assert len(text.splitlines()) <= 15


def test_a_label_makes_a_job_of_clicks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clicks(tmp_path / "log.tsv")
    found, _ = guessed(tmp_path, tmp_path / "log.tsv", capsys)
    assert isinstance(found, CtrConfig)
    assert (found.data.label, found.data.time, found.model.kind) == ("clicked", "shown_at", "dlrm")
    assert [(one.name, one.kind) for one in found.data.features] == [
        ("user", "id"),
        ("ad_id", "id"),
        ("tags", "ids"),
        ("price", "number"),
        ("age", "number"),
        ("zip", "id"),
        ("place", "id"),
    ]


def test_columns_of_parquet_files_say_what_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "day=1").mkdir()
    film_log(tmp_path / "day=1" / "log.parquet")
    found, text = guessed(tmp_path, tmp_path / "day=1" / "log.parquet", capsys)
    assert isinstance(found, Config)
    assert (found.data.user, found.data.item, found.data.time) == ("UserId", "movieId", "when")
    assert [(one.name, one.kind, one.of) for one in found.data.features] == [("movie_tags", "ids", "item")]
    assert "# vector: left out, holds list<element: double>" in text
    assert "# struct: left out, holds struct<a: int64>" in text


def test_what_cannot_be_guessed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("a,b\n1,x\n2,y\n")
    for words, said in (
        (
            ["--guess", str(path)],
            f"{path}: no column looks like users or items, and none like a label of 0 and 1; the columns are: a, b",
        ),
        (["--guess", str(tmp_path / "none.csv")], "none.csv: cannot read the file"),
        (["--guess", str(path), "--out", str(path)], "is there already"),
        (["job.yaml", "--guess", str(path)], "--guess writes a configuration, and takes none"),
        (["job.yaml", "--out", "x.yaml"], "--out goes with --guess FILE"),
    ):
        assert main(["train", *words]) == 2
        assert said in capsys.readouterr().err


def test_a_few_prices_that_are_missing_or_wrong_leave_it_a_number_of_the_item(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.csv"
    prices = [{3: "n/k", 9: "", 27: ""}.get(row, f"{1.25 + row % 40}") for row in range(ROWS)]
    path.write_text("viewer,sku,price\n" + "".join(f"u{row % 30},S-{row % 40},{price}\n" for row, price in enumerate(prices)))
    found, text = guessed(tmp_path, path, capsys)
    assert isinstance(found, Config)
    assert [(one.name, one.kind, one.of) for one in found.data.features] == [("price", "number", "item")]
    assert "  on_bad_row: skip  # price is wrong in 1 of the first rows" in text.splitlines()


def test_a_file_with_semicolons_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user;item\nu1;i1\nu2;i2\n")
    assert main(["train", "--guess", str(path)]) == 2
    assert "this header has semicolons in it" in capsys.readouterr().err
