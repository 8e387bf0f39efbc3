"""Odd files: each is read as its clean twin is and trains to the same losses, or is refused with place and remedy."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.cli import main
from shardembed.errors import DataError
from shardembed.recipes.config import DataConfig
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.source import Chunk, all_chunks, concatenate
from shardembed.recipes.split_config import LAST

HEADER = ["user_id", "item_id", "time"]
USERS = [(row * 7) % 9 for row in range(60)]
ITEMS = [(row * row) % 13 for row in range(60)]
SECONDS = [1_700_000_000 + 3600 * ((row * 11) % 60) for row in range(60)]
NUMBERS = [*zip(map(str, USERS), map(str, ITEMS), map(str, SECONDS), strict=True)]
Rows = list[tuple[str, ...]]


def moment(seconds: int, hours: int | None = 0) -> str:
    """A date, in the zone so many hours east; without a zone where `hours` is None."""
    zone = timezone.utc if hours is None else timezone(timedelta(hours=hours))
    said = datetime.fromtimestamp(seconds, zone).isoformat()
    return said.removesuffix("+00:00") if hours is None else said


TEXTS: Rows = [(f"u{user}", f"SKU-{item}", moment(second)) for user, item, second in zip(USERS, ITEMS, SECONDS, strict=True)]
CLEAN = {"numbers": NUMBERS, "texts": TEXTS}


def lines(rows: Rows, sign: str = ",", end: str = "\n", header: list[str] = HEADER) -> str:
    return "".join(sign.join(row) + end for row in [tuple(header), *rows])


@dataclass(frozen=True)
class Odd:
    """An odd file: how it is written, and what is to come of it.

    Attributes:
        write: into an empty folder; returns the path.
        twin: the clean rows that it holds, or their name.
        said: what the error says, where it is refused.
        settings: of the data section.
        twin_settings: of the twin's.
    """

    write: Callable[[Path], Path | str]
    twin: str | Rows = "numbers"
    said: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    twin_settings: dict[str, Any] = field(default_factory=dict)


def text(content: str | bytes, name: str = "odd.csv", encoding: str = "utf-8") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode(encoding) if isinstance(content, str) else content)
        return folder / name

    return write


def table(name: str = "odd.parquet", **columns: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        plain = {"user_id": USERS, "item_id": ITEMS, "time": SECONDS}
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        parquet.write_table(pa.table({**plain, **columns}), folder / name)
        return folder / name

    return write


def texts(kind: pa.DataType) -> Callable[[Path], Path]:
    """The twin of texts, as a type of Arrow's."""
    columns = {name: pa.array(values, pa.string()) for name, values in zip(HEADER, zip(*TEXTS, strict=True), strict=True)}
    if pa.types.is_dictionary(kind):
        return table(**{name: column.dictionary_encode() for name, column in columns.items()})
    return table(**{name: column.cast(kind) for name, column in columns.items()})


def with_more(cells: str, header: str = "more") -> str:
    return lines([(*row, cells) for row in NUMBERS], header=[*HEADER, header])


def partitions(folder: Path) -> Path:
    for day in range(3):
        where = folder / "log" / f"time=2024-01-0{day + 1}"
        where.mkdir(parents=True)
        (where / "part-0.csv").write_text(lines([row[:2] for row in TEXTS[day * 20 : day * 20 + 20]], header=HEADER[:2]))
    (folder / "log" / "_SUCCESS").write_text("")
    (folder / "log" / ".hidden.csv").write_text("no data")
    (folder / "log" / "_tmp").mkdir()
    (folder / "log" / "_tmp" / "part.csv").write_text("no data")
    return folder / "log"


def in_memory(folder: Path) -> str:
    with fsspec.open(f"memory://odd/{folder.name}/log.csv.gz", "wb") as file:
        file.write(gzip.compress(lines(TEXTS).encode()))  # pyright: ignore[reportAttributeAccessIssue]
    return f"memory://odd/{folder.name}"


def changed(rows: Rows, place: int, column: int, value: str) -> Rows:
    return [
        tuple(value if (number, at) == (place, column) else cell for at, cell in enumerate(row)) for number, row in enumerate(rows)
    ]


def less(place: int, rows: Rows = NUMBERS) -> Rows:
    return rows[:place] + rows[place + 1 :]


AS_TEXTS = {"texts": ("user_id", "item_id")}
SKIP = {"on_bad_row": "skip"}
PADDED = [(f"00{user}", item, time) for user, item, time in NUMBERS]
MIXED = changed(NUMBERS, 41, 0, "guest")
HUGE = [(str((1 << 63) + int(user)), str(-int(item) - 5), time) for user, item, time in NUMBERS]
ZONES = [(*row[:2], moment(second, place % 5 - 2)) for place, (row, second) in enumerate(zip(TEXTS, SECONDS, strict=True))]
ODD = {
    "byte order mark": Odd(text(lines(NUMBERS), encoding="utf-8-sig")),
    "CRLF": Odd(text(lines(NUMBERS, end="\r\n"))),
    "CR alone": Odd(text(lines(NUMBERS, end="\r"))),
    "no line end at the end": Odd(text(lines(NUMBERS).rstrip())),
    "blank first line": Odd(text("\n" + lines(NUMBERS)), said=r"odd.csv:1: the first line is empty; .* the names of its columns"),
    "blank lines between": Odd(text(lines(NUMBERS).replace("\n", "\n\n"))),
    "all is quoted": Odd(text(lines([tuple(f'"{cell}"' for cell in row) for row in TEXTS])), twin="texts"),
    "quoted commas and line breaks": Odd(text(with_more('"a,b\nc ""d"""'))),
    "trailing delimiter": Odd(text(lines([(*row, "") for row in NUMBERS], header=[*HEADER, ""]))),
    "ragged rows": Odd(
        text(lines([*NUMBERS[:7], ("1", "2"), *NUMBERS[7:]])), said=r"odd.csv:9: 2 field\(s\), but the header line has 3"
    ),
    "ragged rows, skipped": Odd(text(lines([*NUMBERS[:7], ("1", "2", "3", "4"), *NUMBERS[7:]])), settings=SKIP),
    "unclosed quote": Odd(text(lines([*NUMBERS[:7], ('"1', "2", "3"), *NUMBERS[7:]])), said=r"odd.csv:9: a quote is not closed"),
    "unclosed quote, skipped": Odd(text(lines([*NUMBERS[:7], ('"1', "2", "3"), *NUMBERS[7:]])), settings=SKIP),
    "a column twice that is not read": Odd(text(lines([(*row, "7", "8") for row in NUMBERS], header=[*HEADER, "x", "x"]))),
    "a column twice that is read": Odd(
        text(with_more("7", "item_id")), said=r"odd.csv: there are 2 columns 'item_id' \(data.item\); rename the others"
    ),
    "UTF-16": Odd(text(lines(NUMBERS), encoding="utf-16"), said=r"odd.csv: is UTF-16; convert it to UTF-8"),
    "UTF-16 without a mark": Odd(text(lines(NUMBERS), encoding="utf-16-le"), said=r"odd.csv:1: .* convert it to UTF-8"),
    "Windows-1252 in another column": Odd(text(with_more("Caf\u00e9 \u20ac"), encoding="cp1252")),
    "Windows-1252 in an id": Odd(
        text(lines(changed(TEXTS, 30, 1, "Caf\u00e9")), encoding="cp1252"),
        said=r"odd.csv:32: column 'item_id': .* is not UTF-8; convert the file",
    ),
    "NUL in an id": Odd(text(lines(changed(TEXTS, 30, 1, "a\0b"))), said=r"odd.csv:32: "),
    "digits and texts": Odd(text(lines(MIXED)), twin=MIXED, twin_settings={"texts": ("user_id",)}),
    "leading zeros": Odd(text(lines(PADDED)), twin=PADDED, twin_settings={"texts": ("user_id",)}),
    "whole floats": Odd(text(lines([(f"{user}.0", f"{item}.", time) for user, item, time in NUMBERS]))),
    "exponents": Odd(
        text(lines(changed(NUMBERS, 3, 0, "1e3"))), twin=changed(NUMBERS, 3, 0, "1e3"), twin_settings={"texts": ("user_id",)}
    ),
    "ids near 2^31": Odd(
        text("user_id,item_id,time\n2147483648,0,1\n2147483649,1,2\n"), twin=[("2147483648", "0", "1"), ("2147483649", "1", "2")]
    ),
    "negative ids and ids of 64 bits": Odd(
        table(user_id=pa.array([(1 << 63) + user for user in USERS], pa.uint64()), item_id=[-item - 5 for item in ITEMS]), twin=HUGE
    ),
    "ids of more than 64 bits": Odd(
        text(lines(changed(NUMBERS, 3, 0, str(1 << 70)))),
        twin=changed(NUMBERS, 3, 0, str(1 << 70)),
        twin_settings={"texts": ("user_id",)},
    ),
    "mixed time zones": Odd(text(lines(ZONES)), twin="texts"),
    "dates without a zone": Odd(
        text(lines([(*row[:2], moment(second, None)) for row, second in zip(TEXTS, SECONDS, strict=True)])), twin="texts"
    ),
    "times in milliseconds": Odd(
        table(time=[1000 * second for second in SECONDS]), twin=[(*row[:2], row[2] + "000") for row in NUMBERS]
    ),
    "seconds with fractions": Odd(
        text(lines([(*row[:2], f"{row[2]}.5") for row in NUMBERS])),
        said=r"odd.csv:2: column 'time': '1700000000.5' is neither a whole number",
    ),
    "NA and nan for numbers": Odd(
        text(lines(changed(NUMBERS, 5, 0, "NA"))),
        said=r"odd.csv:7: column 'user_id': the value is missing; remove the row or fill it in",
    ),
    "None and nan for numbers, skipped": Odd(
        text(lines(changed(changed(NUMBERS, 6, 0, "None"), 5, 1, "nan"))), twin=less(5, less(6)), settings=SKIP
    ),
    "nulls": Odd(
        table(user_id=[*USERS[:5], None, *USERS[6:]]), said=r"odd.parquet: row 5 \(from 0\), column 'user_id': the value is missing"
    ),
    "NaN, skipped": Odd(table(user_id=[*map(float, USERS[:5]), float("nan"), *USERS[6:]]), twin=less(5), settings=SKIP),
    "an empty file": Odd(text(""), said=r"odd.csv:1: the file is empty; the first line of a text file must have the names"),
    "a header alone": Odd(text("user_id,item_id,time\n"), twin=[]),
    "one row": Odd(text("user_id,item_id,time\n1,2,3"), twin=[("1", "2", "3")]),
    "rows that come twice": Odd(text(lines(NUMBERS + NUMBERS)), twin=NUMBERS + NUMBERS),
    "gzip without its suffix": Odd(text(gzip.compress(lines(NUMBERS).encode()))),
    "gzip's suffix without gzip": Odd(text(lines(NUMBERS), "odd.csv.gz")),
    "gzip in two parts": Odd(
        text(
            gzip.compress(lines(NUMBERS[:9]).encode()) + gzip.compress(lines(NUMBERS[9:]).split("\n", 1)[1].encode()), "odd.csv.gz"
        )
    ),
    "gzip that was cut off": Odd(
        text(gzip.compress(lines(NUMBERS * 9).encode())[:-20], "odd.csv.gz"), said=r"odd.csv.gz: .*is the file whole\?"
    ),
    "bzip2": Odd(text(bz2.compress(lines(NUMBERS).encode()), "odd.csv.bz2")),
    "xz": Odd(text(lzma.compress(lines(NUMBERS).encode()), "odd.csv.xz")),
    "zstd": Odd(text(pa.Codec("zstd").compress(lines(NUMBERS).encode(), asbytes=True), "odd.csv.zst")),
    "Parquet under .csv": Odd(table("odd.csv"), said=r"odd.csv: is a Parquet file; give it the suffix .parquet"),
    "CSV under .parquet": Odd(
        text(lines(NUMBERS), "odd.parquet"), said=r"odd.parquet: cannot read the file: .*is it a Parquet file"
    ),
    "zip": Odd(text(b"PK\x03\x04 and so on"), said=r"odd.csv: is a zip archive; unpack it"),
    "large_string": Odd(texts(pa.large_string()), twin="texts"),
    "string_view": Odd(texts(pa.string_view()), twin="texts"),
    "binary": Odd(texts(pa.binary()), twin="texts"),
    "dictionary": Odd(texts(pa.dictionary(pa.int32(), pa.string())), twin="texts"),
    "decimals": Odd(table(user_id=[Decimal(user) for user in USERS], item_id=pa.array(ITEMS, pa.decimal128(30, 2)))),
    "small integers": Odd(table(user_id=pa.array(USERS, pa.int8()), item_id=pa.array(ITEMS, pa.uint16()))),
    "halves": Odd(
        table(user_id=[user + 0.5 for user in USERS]), said=r"row 0 \(from 0\), column 'user_id': '0.5' is not an integer"
    ),
    "timestamps": Odd(
        table(
            user_id=[row[0] for row in TEXTS],
            item_id=[row[1] for row in TEXTS],
            time=pa.array(SECONDS, pa.timestamp("s", "Asia/Tokyo")),
        ),
        twin="texts",
    ),
    "nanoseconds": Odd(
        table(
            user_id=[row[0] for row in TEXTS],
            item_id=[row[1] for row in TEXTS],
            time=pa.array([second * 10**9 for second in SECONDS], pa.timestamp("ns")),
        ),
        twin="texts",
    ),
    "lists of ids for an id": Odd(
        table(user_id=[[user] for user in USERS]), said=r"odd.parquet: column 'user_id' \(data.user\) holds list<.*; ids must be"
    ),
    "structs": Odd(
        table(item_id=[{"id": item} for item in ITEMS]), said=r"column 'item_id' \(data.item\) holds struct<.*; ids must be"
    ),
    "booleans for ids": Odd(
        table(user_id=[user > 3 for user in USERS]), said=r"column 'user_id' \(data.user\) holds bool; ids must be"
    ),
    "partitions with a folder of hidden files": Odd(
        partitions, twin=[(*row[:2], f"2024-01-0{1 + place // 20}") for place, row in enumerate(TEXTS)]
    ),
    "a folder without data": Odd(
        lambda folder: folder, said=r"data.path: .* is a folder without a data file; those have one of the suffixes"
    ),
    "a URL": Odd(in_memory, twin="texts"),
    "a URL that takes a package": Odd(
        lambda folder: "gs://bucket/log.csv", said=r"gs://bucket/log.csv: to read gs:// takes more packages"
    ),
    "a very long value beside": Odd(
        text(lines([(*row, "x" * (300_000 * (place == 9))) for place, row in enumerate(NUMBERS)], header=[*HEADER, "more"]))
    ),
    "a very long value beside a bad row": Odd(
        text(
            lines(
                [(*row, "x" * (300_000 * (place == 9))) for place, row in enumerate(changed(NUMBERS, 5, 0, ""))],
                header=[*HEADER, "more"],
            )
        ),
        twin=less(5),
        settings=SKIP,
    ),
    "tabs in a .csv": Odd(text(lines(NUMBERS, "\t")), said=r"this header has tabs in it, but .* name the file by what it holds"),
    "semicolons": Odd(text(lines(NUMBERS, ";")), said=r"this header has semicolons in it, but .*replace them"),
    "another name of a column": Odd(
        text(lines(NUMBERS, header=["userid", *HEADER[1:]])), said=r"no column 'user_id' \(data.user\); did you mean 'userid'"
    ),
}


def data_of(path: Path | str, settings: dict[str, Any]) -> DataConfig:
    return DataConfig(path=(str(path),), time="time", split=LAST, **settings)


def read(path: Path | str, settings: dict[str, Any]) -> Chunk:
    return concatenate(
        [
            Chunk(c.users, c.items, times=c.times, nanoseconds=c.nanoseconds)
            for c in all_chunks(open_source(data_of(path, settings)))
        ]
    )


def twin_of(odd: Odd, folder: Path) -> Path:
    path = folder / "twin.csv"
    path.write_text(lines(CLEAN[odd.twin] if isinstance(odd.twin, str) else odd.twin))
    return path


@pytest.mark.parametrize("name", ODD)
def test_an_odd_file_is_read_as_its_clean_twin_or_refused(tmp_path: Path, name: str) -> None:
    odd = ODD[name]
    (tmp_path / "odd").mkdir()
    path = odd.write(tmp_path / "odd")
    if odd.said:
        with pytest.raises(DataError, match=odd.said):
            read(path, odd.settings)
        return
    found, expected = read(path, odd.settings), read(twin_of(odd, tmp_path), odd.twin_settings)
    for one, other in zip(found.columns(), expected.columns(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert isinstance(odd.twin, str) or len(found) == len(odd.twin)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", [name for name, odd in ODD.items() if not odd.said and odd.twin != [] and name not in ("one row", "ids near 2^31")]
)
def test_an_odd_file_trains_to_the_losses_of_its_twin(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ODD[name]
    (tmp_path / "odd").mkdir()
    losses = []
    for path, settings in ((odd.write(tmp_path / "odd"), odd.settings), (twin_of(odd, tmp_path), odd.twin_settings)):
        data = ", ".join(
            [
                f"path: '{path}'",
                "time: time",
                "split: last",
                *(f"{key}: {list(one) if isinstance(one, tuple) else one}" for key, one in settings.items()),
            ]
        )
        rest = (
            "model: {embedding_dim: 4, negatives: 8}\ntrain: {epochs: 2, global_batch_size: 10}\n"
            "log: {page: false}\ncheckpoint: {every_steps: null}"
        )
        (tmp_path / "job.yaml").write_text(f"data: {{{data}}}\n{rest}\nrun_dir: {tmp_path / 'runs'}\n")
        assert main(["train", str(tmp_path / "job.yaml"), "--json", "--fresh"]) == 0
        losses.append(json_of(capsys)["losses"])
    assert losses[0] == losses[1]
    assert len(losses[0]) > 4


def json_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    return json.loads(capsys.readouterr().out)


def test_times_are_ordered_to_the_nanosecond(tmp_path: Path) -> None:
    times = [f"2023-11-14T22:13:20.000000{nano}Z" for nano in (300, 100, 200)]
    path = text(lines([("0", str(5 + place), time) for place, time in enumerate(times)]))(tmp_path)
    found = read(path, {})
    assert found.nanoseconds is not None
    assert found.nanoseconds.tolist() == [300, 100, 200]
