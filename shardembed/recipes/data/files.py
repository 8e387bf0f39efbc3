"""Interactions from CSV, TSV and Parquet files, streamed in record batches: only the columns asked for, never the whole file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from shardembed.errors import DataError
from shardembed.explain import nearest
from shardembed.optional import missing
from shardembed.recipes.data.bad import Dropped, Problem
from shardembed.recipes.data.opening import UNREADABLE, named
from shardembed.recipes.data.source import Chunk

try:
    import pyarrow as pa
    from pyarrow import compute, parquet

    from shardembed.recipes.data.kinds import ID, USER, Kind
    from shardembed.recipes.data.text import TextFile
except ImportError as error:
    raise DataError(missing("pyarrow", "train", "reading data files", error)) from error

DELIMITERS = {".csv": ",", ".tsv": "\t"}
SIGNS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars", " ": "blanks"}
PARQUET_SUFFIXES = (".parquet", ".pq")
SETTINGS = ("data.user", "data.item", "data.time")
BATCH_ROWS = 1 << 16


class FileInteractions:
    """Two or three columns of a file; the suffix (.csv, .tsv, .parquet, .pq) tells the format. Text may be compressed with
    gzip, and then has .gz behind the suffix.

    Args:
        time: whole numbers, or dates with or without a time of day; None where times are of no interest.
        any_user: users may be any integers of 64 bits with a sign, for they have no rows in a table.
        on_bad_row: "raise", or "skip" to leave out rows that hold no two ids; the chunks say which ones were.

    Raises:
        DataError: on construction, where the file or a column is missing; while reading, for a value that is no id, with its line.
    """

    def __init__(
        self,
        path: str | Path,
        user: str,
        item: str,
        on_bad_row: Literal["raise", "skip"] = "raise",
        time: str | None = None,
        any_user: bool = False,
    ) -> None:
        self._path = Path(path)
        self._columns = (user, item) if time is None else (user, item, time)
        self._kinds = (USER if any_user else ID, ID)
        self._skip = on_bad_row == "skip"
        suffix = Path(self._path.stem if self._path.suffix.lower() == ".gz" else self._path.name).suffix.lower()
        if suffix not in (*DELIMITERS, *PARQUET_SUFFIXES):
            known = ", ".join((*DELIMITERS, *(f"{each}.gz" for each in DELIMITERS), *PARQUET_SUFFIXES))
            raise DataError(f"{path}: the suffix {self._path.suffix!r} tells no known format; use one of {known}")
        for one, other in combinations(range(len(self._columns)), 2):
            if self._columns[one] == self._columns[other]:
                raise DataError(f"{path}: {SETTINGS[one]} and {SETTINGS[other]} both name the column {self._columns[one]!r}")
        self._text: TextFile | None = None
        try:
            if suffix in DELIMITERS:
                self._text = TextFile.open(self._path, DELIMITERS[suffix], self._columns, self._kinds[0])
                names = self._text.header
            else:
                names = list(parquet.read_schema(self._path).names)
        except (*UNREADABLE, pa.ArrowInvalid) as error:
            raise DataError(f"{self._path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error
        self._check_columns(names)

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def parts(self) -> tuple[str]:
        return (self.name,)

    def chunks(self, part: int = 0) -> Iterator[Chunk]:
        for (users, items, *times), problems in self._text_rows() if self._text is not None else self._parquet_rows():
            if problems and not self._skip:
                raise DataError(problems[0].text)
            yield Chunk(users, items, Dropped.of(problems), times[0] if times else None)

    def _check_columns(self, names: list[str]) -> None:
        for setting, column in zip(SETTINGS, self._columns, strict=False):
            if column not in names:
                near = nearest(column, names) or "."
                listed = (", ".join(names) or "(none)") + self._delimited_by(names)
                raise DataError(f"{self._path}: there is no column {column!r} ({setting}){near} The columns are: {listed}")
            if names.count(column) > 1:
                raise DataError(f"{self._path}: there are {names.count(column)} columns {column!r} ({setting}); rename the others")

    def _delimited_by(self, names: list[str]) -> str:
        """A hint where another sign seems to stand between the names of a header."""
        for sign, name in SIGNS.items():
            if self._text is not None and len(names) == 1 and sign in names[0]:
                return (
                    f"; this header has {name} in it, but between two fields must be a comma in a .csv file, and a tab in a .tsv "
                    "file: replace them, or name the file by what it holds, or write the data as Parquet"
                )
        return ""

    def _text_rows(self) -> Iterator[tuple[np.ndarray, list[Problem]]]:
        assert self._text is not None
        try:
            yield from self._text.rows()
        except UNREADABLE as error:
            raise DataError(f"{self._path}: {getattr(error, 'strerror', None) or error}; is the file whole?") from error

    def _parquet_rows(self) -> Iterator[tuple[np.ndarray, list[Problem]]]:
        row = 0
        try:
            with parquet.ParquetFile(self._path) as file:
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(self._columns)):
                    yield self._judged(batch, row)
                    row += batch.num_rows
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self._path}: {error}") from error

    def _judged(self, batch: pa.RecordBatch, first_row: int) -> tuple[np.ndarray, list[Problem]]:
        """The values of the batch's good rows, int64 `[columns, n]`, and what is wrong with the others."""
        kept = np.ones(batch.num_rows, bool)
        problems: dict[int, Problem] = {}
        values = []
        for name, usable in zip(self._columns[:2], self._kinds, strict=True):
            column = batch.column(name)
            if not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
                raise DataError(f"{self._path}: column {name!r} holds {column.type}; ids must be integers")
            found = _ids(column, usable)
            if found is None:
                found, wrong = _slow_ids(column, usable)
                for row, (kind, text) in wrong.items():
                    where = f"{self._path}: row {first_row + row} (from 0), column {name!r}"
                    problems.setdefault(row, Problem(kind, f"{where}: {text}"))
                    kept[row] = False
            values.append(found)
        for name in self._columns[2:]:
            times, absent = self._times(batch.column(name), name)
            for row in np.flatnonzero(absent).tolist():
                where = f"{self._path}: row {first_row + row} (from 0), column {name!r}"
                problems.setdefault(row, Problem("missing", f"{where}: the value is missing; remove the row or fill it in"))
            kept &= ~absent
            values.append(times)
        return np.stack(values)[:, kept], [problems[row] for row in sorted(problems)]

    def _times(self, column: pa.Array, name: str) -> tuple[np.ndarray, np.ndarray]:
        """int64 `[n]`, and where there is none bool `[n]`."""
        types = pa.types
        if types.is_timestamp(column.type) or types.is_date(column.type):
            column = compute.cast(column, pa.timestamp("us"), safe=False)  # nanoseconds are cut off
        elif not types.is_integer(column.type):
            raise DataError(
                f"{self._path}: column {name!r} (data.time) holds {column.type}; times must be timestamps, dates or integers"
            )
        try:
            whole = compute.cast(column, pa.int64())
        except pa.ArrowInvalid as error:
            raise DataError(f"{self._path}: column {name!r} (data.time): {error}; times must fit int64") from error
        absent = column.is_null().to_numpy(zero_copy_only=False)
        return compute.fill_null(whole, 0).to_numpy(zero_copy_only=False), absent


class SeveralFiles:
    """The interactions of several files, one file after the other.

    patterns: what named them.
    """

    def __init__(self, files: Sequence[FileInteractions], patterns: Sequence[str]) -> None:
        self._files, self._patterns = files, patterns

    @property
    def name(self) -> str:
        return named(self._patterns, len(self._files))

    @property
    def parts(self) -> list[str]:
        return [file.name for file in self._files]

    def chunks(self, part: int) -> Iterator[Chunk]:
        return self._files[part].chunks()


def _ids(column: pa.Array, kind: Kind) -> np.ndarray | None:
    """The ids int64 `[n]` of one column; None where one is unusable or might be."""
    if column.null_count:
        return None
    if pa.types.is_string(column.type):
        return kind.fast(column)
    extremes = compute.call_function("min_max", [column]).as_py()
    if len(column) and (extremes["min"] < kind.lowest or extremes["max"] > kind.highest):
        return None
    return compute.cast(column, pa.int64()).to_numpy(zero_copy_only=False)


def _slow_ids(column: pa.Array, kind: Kind) -> tuple[np.ndarray, dict[int, tuple[str, str]]]:
    """The ids, 0 in place of those that are none, and what is wrong with these by row."""
    ids = np.zeros(len(column), np.int64)
    wrong = {}
    is_text = pa.types.is_string(column.type)
    for row, held in enumerate((column.view(pa.binary()) if is_text else column).to_pylist()):
        value = held.decode("utf-8", "replace") if isinstance(held, bytes) else held
        problem = kind.problem(value)
        if problem is not None:
            wrong[row] = problem
        else:
            ids[row] = int(value)
    return ids, wrong
