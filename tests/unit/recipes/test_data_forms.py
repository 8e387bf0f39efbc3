"""The same rows in every form that a file may give them: types of Arrow, text, units of time; and times to the nanosecond."""

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from shardembed.errors import DataError
from shardembed.inputs.vocab import Vocabulary
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.files import FileInteractions
from shardembed.recipes.data.sequences import scan
from shardembed.recipes.data.source import all_chunks, concatenate
from shardembed.recipes.sequence_config import SequenceDataConfig

IDS = [3, 0, 37, 5, 37, (1 << 32) - 1]
TEXTS = [str(value) for value in IDS]
FORMS: dict[str, Any] = {
    "int64": pa.array(IDS, pa.int64()),
    "uint32": pa.array(IDS, pa.uint32()),
    "uint64": pa.array(IDS, pa.uint64()),
    "double": pa.array(IDS, pa.float64()),
    "decimal": pa.array([Decimal(value) for value in IDS], pa.decimal128(20, 0)),
    "decimal with a scale": pa.array([Decimal(f"{value}.00") for value in IDS], pa.decimal256(40, 2)),
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([text.encode() for text in TEXTS]),
    "large_binary": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
    "texts of floats": pa.array([f"{text}.0" for text in TEXTS]),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "dictionary of large strings": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "dictionary of integers": pa.array(IDS, pa.int64()).dictionary_encode(),
    "large dictionary": pa.array(TEXTS).cast(pa.dictionary(pa.int64(), pa.string())),
}


@pytest.mark.parametrize("missing", [False, True])  # one bad row has those beside it read one by one
@pytest.mark.parametrize("form", FORMS)
def test_ids_are_read_from_every_type_of_arrow(tmp_path: Path, form: str, missing: bool) -> None:
    path, column = tmp_path / "ids.parquet", FORMS[form]
    if missing:
        plain = column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column
        plain = pa.array([*plain.to_pylist(), None], plain.type)
        column = plain.dictionary_encode() if isinstance(column, pa.DictionaryArray) else plain
    parquet.write_table(pa.table({"user": column, "item": column}), path)
    chunk = concatenate(list(all_chunks(source := FileInteractions(path, "user", "item", "skip"))))
    assert chunk.users.tolist() == chunk.items.tolist() == IDS
    assert sum(one.dropped.kinds.get("missing", 0) for one in source.chunks()) == missing


@pytest.mark.parametrize("bad", ["", "37.5", "1e3", "0x5"])
def test_whole_numbers_of_a_text_file_may_have_a_point(tmp_path: Path, bad: str) -> None:
    """As pandas writes integers where some are missing."""
    path = tmp_path / "ids.csv"
    path.write_text("user,item\n" + "".join(f"{text}.0,{text}.\n" for text in TEXTS) + (f"1,{bad}\n" if bad else ""))
    chunks = list(FileInteractions(path, "user", "item", "skip").chunks())
    whole = concatenate(chunks)
    assert whole.users.tolist() == whole.items.tolist() == IDS
    assert [place.split("column ")[1] for one in chunks for place in one.dropped.places] == (
        [f"'item': {bad!r} is not an integer; number users and items from 0"] if bad else []
    )


def test_floats_that_leave_integers_out_are_no_users(tmp_path: Path) -> None:
    path = tmp_path / "users.parquet"
    parquet.write_table(pa.table({"user": [2.0**53 - 1, 2.0**53, 2.0**70], "item": [1, 2, 3]}), path)
    (chunk,) = FileInteractions(path, "user", "item", "skip", any_user=True).chunks()
    assert chunk.users.tolist() == [(1 << 53) - 1]
    assert "is a float beyond 2^53, where floats leave integers out; store integers" in chunk.dropped.places[0]
    with pytest.raises(DataError, match=r"row 1 \(from 0\), column 'user': 9007199254740992 is a float beyond 2\^53"):
        list(FileInteractions(path, "user", "item", any_user=True).chunks())


@pytest.mark.parametrize("form", FORMS)
def test_a_vocabulary_is_counted_from_every_type_of_arrow(tmp_path: Path, form: str) -> None:
    path = tmp_path / "ids.parquet"
    parquet.write_table(pa.table({"c": FORMS[form]}), path)
    found = Vocabulary.from_files(path, "c")
    expected = FORMS[form].dictionary_decode() if isinstance(FORMS[form], pa.DictionaryArray) else FORMS[form]
    values = [value.decode() if isinstance(value, bytes) else value for value in expected.to_pylist()]
    wanted: list[Any] = values if isinstance(values[0], str) else [int(value) for value in values]
    assert found == Vocabulary.build([wanted])
    assert found.kind == ("texts" if isinstance(values[0], str) else "integers")


def sequence(*paths: Path, on_bad_row: Literal["raise", "skip"] = "raise") -> list[int]:
    settings = SequenceDataConfig(
        path=tuple(map(str, paths)), user="user_id", item="item_id", time="timestamp", on_bad_row=on_bad_row
    )
    return scan(open_source(settings)).taken.tolist()


SECOND = 1_700_000_000
MOMENTS = {5: Fraction(300, 10**9), 6: Fraction(100, 10**9), 7: Fraction(200, 10**9), 8: Fraction(1), 9: Fraction(-1, 10**9)}
BY_TIME = sorted(MOMENTS, key=lambda item: MOMENTS[item])  # by exact numbers


def iso(moment: Fraction, zone: str) -> str:
    nanoseconds = SECOND * 10**9 + int(moment * 10**9)
    seconds, rest = divmod(nanoseconds, 10**9)
    shift = 3600 if zone == "+01:00" else 0
    shown = datetime.fromtimestamp(seconds + shift, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{shown}.{rest:09}{zone}"


@pytest.mark.parametrize("form", ["Z", "", "+01:00", "mixed", "parquet text", "ns", "ns of a zone", "dictionary", "integers"])
def test_times_are_told_apart_to_the_nanosecond(tmp_path: Path, form: str) -> None:
    exact = [SECOND * 10**9 + int(moment * 10**9) for moment in MOMENTS.values()]
    texts = [iso(moment, form if form in ("", "+01:00") else "Z") for moment in MOMENTS.values()]
    if form == "mixed":
        texts[1::2] = [iso(moment, "+01:00") for moment in list(MOMENTS.values())[1::2]]
    columns = {
        "parquet text": lambda: pa.array(texts),
        "dictionary": lambda: pa.array(texts).dictionary_encode(),
        "ns": lambda: pa.array(exact, pa.timestamp("ns")),
        "ns of a zone": lambda: pa.array(exact, pa.timestamp("ns", "Asia/Tokyo")),
    }
    path = tmp_path / "log.csv"
    if form in columns:
        path = tmp_path / "log.parquet"
        parquet.write_table(pa.table({"user_id": [0] * 5, "item_id": list(MOMENTS), "timestamp": columns[form]()}), path)
    else:
        written = exact if form == "integers" else texts
        rows = "".join(f"0,{item},{text}\n" for item, text in zip(MOMENTS, written, strict=True))
        path.write_text("user_id,item_id,timestamp\n" + rows)
    assert sequence(path) == BY_TIME


def test_integers_of_19_digits_are_times_in_either_format(tmp_path: Path) -> None:
    times = {1: (1 << 63) - 1, 2: (1 << 63) - 3, 3: -(1 << 63), 4: (1 << 63) - 2}
    wanted = sorted(times, key=lambda item: times[item])
    text, packed = tmp_path / "log.csv", tmp_path / "log.parquet"
    text.write_text("user_id,item_id,timestamp\n" + "".join(f"0,{item},{time}\n" for item, time in times.items()))
    parquet.write_table(pa.table({"user_id": [0] * 4, "item_id": list(times), "timestamp": list(times.values())}), packed)
    assert sequence(text) == sequence(packed) == wanted
    too_large = pa.array([5, (1 << 63)], pa.uint64())
    parquet.write_table(pa.table({"user_id": [0] * 2, "item_id": [1, 2], "timestamp": too_large}), packed)
    with pytest.raises(DataError, match=rf"row 1 \(from 0\), column 'timestamp': {1 << 63} does not fit 64 bits with a sign"):
        sequence(packed)


def test_units_and_formats_of_times_may_differ_from_file_to_file(tmp_path: Path) -> None:
    """One user's items in the order of time, dealt to files of every unit."""
    start = int(np.datetime64("2023-11-14", "s").astype(np.int64))
    units = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
    for number, (unit, scale) in enumerate(units.items()):
        times = pa.array([(start + 60 * (4 * row + number)) * scale for row in range(5)], pa.timestamp(unit, "UTC"))
        table = pa.table({"user_id": [0] * 5, "item_id": [4 * row + number for row in range(5)], "timestamp": times})
        # Parquet itself has no seconds: its files say with Arrow's schema that they were.
        parquet.write_table(table, tmp_path / f"{number}.parquet")
    days = {100: "2023-11-13", 101: "9999-12-31", 102: "2023-11-14T00:00:30.000000001+00:00"}
    (tmp_path / "4.csv").write_text("user_id,item_id,timestamp\n" + "".join(f"0,{item},{day}\n" for item, day in days.items()))
    dates = pa.array([0, (1 << 31) - 1], pa.date32())  # the last one is beyond what microseconds reach
    parquet.write_table(pa.table({"user_id": [0] * 2, "item_id": [200, 201], "timestamp": dates}), tmp_path / "5.parquet")
    paths = sorted(tmp_path.iterdir())
    settings = SequenceDataConfig(path=tuple(map(str, paths)), user="user_id", item="item_id", time="timestamp", on_bad_row="skip")
    data = scan(open_source(settings))
    assert data.taken.tolist() == [200, 100, 0, 102, *range(1, 20), 101]
    assert data.dropped.kinds == {"too large": 1}
    assert "row 1 (from 0), column 'timestamp': the time is more than 292,000 years away" in data.dropped.places[0]
    (tmp_path / "6.csv").write_text("user_id,item_id,timestamp\n0,1,1700000000\n")
    with pytest.raises(DataError, match=rf"data.time: {paths[0]} has dates, but {tmp_path / '6.csv'} has whole numbers"):
        sequence(paths[0], tmp_path / "6.csv")


@pytest.mark.parametrize("first", ["0,5,", "0,5", '"0,5,7', "0,5,,"])
def test_the_first_row_with_a_time_says_how_times_are_written(tmp_path: Path, first: str) -> None:
    """Else such a file would be taken for one of whole numbers, or of neither, and mixed with files of the other."""
    numbers, dates = tmp_path / "0.csv", tmp_path / "1.csv"
    numbers.write_text(f"user_id,item_id,timestamp\n{first}\n0,6,1900000000\n0,7,1900000002\n0,8,1900000001\n")
    dates.write_text(f"user_id,item_id,timestamp\n{first}\n0,6,2024-01-02\n0,7,2024-01-03\n0,8,2024-01-01\n")
    assert sequence(numbers, on_bad_row="skip") == [6, 8, 7]
    assert sequence(dates, on_bad_row="skip") == [8, 6, 7]
    with pytest.raises(DataError, match=f"data.time: {dates} has dates, but {numbers} has whole numbers"):
        sequence(numbers, dates, on_bad_row="skip")
    with pytest.raises(DataError, match=f"{numbers}:2: "):
        sequence(numbers)


def test_an_empty_text_of_parquet_does_not_say_how_times_are_written(tmp_path: Path) -> None:
    times = pa.array([None, "", "2024-01-02", "2024-01-03", "2024-01-01"])
    parquet.write_table(pa.table({"user_id": [0] * 5, "item_id": list(range(5)), "timestamp": times}), tmp_path / "log.parquet")
    assert sequence(tmp_path / "log.parquet", on_bad_row="skip") == [4, 2, 3]


def test_a_year_0_is_no_time_whatever_stands_beside_it(tmp_path: Path) -> None:
    """pyarrow has one, and Python has none: which of the two reads a row must not decide."""
    path = tmp_path / "log.csv"
    for beside in ("2024-01-01", "2024-01-01T00:00+01:00"):
        path.write_text(f"user_id,item_id,timestamp\n0,6,2024-01-03\n0,7,{beside}\n0,8,2024-01-02\n0,9,0000-01-01\n")
        with pytest.raises(DataError, match=r"log.csv:5: column 'timestamp': '0000-01-01' is no time"):
            sequence(path)
