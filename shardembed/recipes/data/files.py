"""Interactions from CSV, TSV and Parquet files, streamed in record batches: only the two columns, never the whole file."""

from __future__ import annotations

import csv as text_rows
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shardembed.errors import DataError
from shardembed.explain import nearest
from shardembed.recipes.data.source import Chunk

try:
    import pyarrow as pa
    from pyarrow import compute, csv, parquet
except ImportError as error:
    raise DataError("reading data files needs pyarrow: pip install 'shardembed[train]'") from error

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_SUFFIXES = (".parquet", ".pq")
BLOCK_BYTES = 4 << 20  # text read at a time
BATCH_ROWS = 1 << 16
MAX_ID = (1 << 32) - 1  # tables and counts have a row for every id up to the largest


class FileInteractions:
    """The two columns of a file; the suffix (.csv, .tsv, .parquet, .pq) tells the format.

    Raises:
        DataError: on construction, where the file or a column is missing; while reading, for a value that is no id, with its line.
    """

    def __init__(self, path: str | Path, user: str, item: str) -> None:
        self._path = Path(path)
        self._columns = (user, item)
        self._suffix = self._path.suffix.lower()
        if self._suffix not in (*DELIMITERS, *PARQUET_SUFFIXES):
            known = ", ".join((*DELIMITERS, *PARQUET_SUFFIXES))
            raise DataError(f"{path}: the suffix {self._path.suffix!r} tells no known format; use one of {known}")
        if user == item:
            raise DataError(f"{path}: data.user and data.item both name the column {user!r}")
        self._check_columns()

    @property
    def name(self) -> str:
        return str(self._path)

    def chunks(self) -> Iterator[Chunk]:
        batches = self._text_batches() if self._suffix in DELIMITERS else self._parquet_batches()
        row = 0
        for batch in batches:
            users, items = (self._ids(batch.column(name), name, row) for name in self._columns)
            row += batch.num_rows
            yield Chunk(users, items)

    def _check_columns(self) -> None:
        try:
            if self._suffix in DELIMITERS:
                names = self._header()
            else:
                names = list(parquet.read_schema(self._path).names)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self._path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error
        for setting, column in zip(("data.user", "data.item"), self._columns, strict=True):
            if column not in names:
                near = nearest(column, names) or "."
                raise DataError(
                    f"{self._path}: there is no column {column!r} ({setting}){near} The columns are: {', '.join(names) or '(none)'}"
                )

    def _header(self) -> list[str]:
        with open(self._path, encoding="utf-8-sig", errors="replace", newline="") as file:
            return next(text_rows.reader(file, delimiter=DELIMITERS[self._suffix]), [])

    def _text_batches(self) -> Iterator[pa.RecordBatch]:
        # Read as text and converted here, so that a bad value can be told from a bad file.
        convert = csv.ConvertOptions(
            include_columns=list(self._columns), column_types=dict.fromkeys(self._columns, pa.string()), strings_can_be_null=False
        )
        try:
            options = csv.ReadOptions(block_size=BLOCK_BYTES), csv.ParseOptions(delimiter=DELIMITERS[self._suffix]), convert
            with csv.open_csv(self._path, *options) as reader:
                yield from reader
        except (OSError, pa.ArrowInvalid) as error:
            raise self._bad_line() or DataError(f"{self._path}: {error}") from error

    def _parquet_batches(self) -> Iterator[pa.RecordBatch]:
        try:
            with parquet.ParquetFile(self._path) as file:
                yield from file.iter_batches(batch_size=BATCH_ROWS, columns=list(self._columns))
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"{self._path}: {error}") from error

    def _ids(self, column: pa.Array, name: str, first_row: int) -> np.ndarray:
        """The ids of one column, int64 `[n]`."""
        if not (pa.types.is_integer(column.type) or pa.types.is_string(column.type)):
            raise DataError(f"{self._path}: column {name!r} holds {column.type}; ids must be integers")
        try:
            ids = None if column.null_count else compute.cast(column, pa.int64()).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            ids = None
        if ids is None or (len(ids) and (ids.min() < 0 or ids.max() > MAX_ID)):
            fallback = DataError(f"{self._path}: column {name!r}: a value from row {first_row} on is no usable id")
            is_text = self._suffix in DELIMITERS
            raise (self._bad_line() if is_text else self._bad_row(column, name, first_row)) or fallback
        return ids

    def _bad_line(self) -> DataError | None:
        """The first bad line of a text file. Reads it again from the start: slow, but only so is the line number exact."""
        with open(self._path, encoding="utf-8-sig", errors="replace", newline="") as file:
            lines = text_rows.reader(file, delimiter=DELIMITERS[self._suffix])
            header = next(lines, [])
            for row in lines:
                where = f"{self._path}:{lines.line_num}"
                if row and len(row) != len(header):
                    return DataError(f"{where}: {len(row)} field(s), but the header line has {len(header)}")
                for name in self._columns if row else ():
                    problem = _problem(row[header.index(name)])
                    if problem:
                        return DataError(f"{where}: column {name!r}: {problem}")
        return None

    def _bad_row(self, column: pa.Array, name: str, first_row: int) -> DataError | None:
        """The first bad value of a Parquet column, by row, from 0."""
        for offset, value in enumerate(column.to_pylist()):
            problem = _problem(value)
            if problem:
                return DataError(f"{self._path}: row {first_row + offset} (from 0), column {name!r}: {problem}")
        return None


def _problem(value: object) -> str:
    """What is wrong with one value, or nothing."""
    if value is None or value == "":
        return "the value is missing; remove the row or fill it in"
    if not re.fullmatch(r"-?\d+", str(value)):
        return f"{value!r} is not an integer; number users and items from 0"
    if int(str(value)) < 0:
        return f"{value} is negative; number users and items from 0"
    if int(str(value)) > MAX_ID:
        return f"{value} is larger than {MAX_ID}; a table has a row for every id up to the largest, so number them from 0"
    return ""
