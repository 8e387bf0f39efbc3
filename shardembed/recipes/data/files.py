"""Interactions from CSV, TSV and Parquet files, streamed in record batches: only the columns asked for, never the whole file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np

from shardembed.config.hints import nearest
from shardembed.config.optional import missing
from shardembed.errors import DataError
from shardembed.inputs.names import Names
from shardembed.recipes.data.bad import Dropped, Problem
from shardembed.recipes.data.opening import UNREADABLE, named
from shardembed.recipes.data.source import Chunk

try:
    import pyarrow as pa
    from pyarrow import parquet

    from shardembed.config.arrow_types import plain_type
    from shardembed.recipes.data.any_ids import INTEGER, ids_like, texts
    from shardembed.recipes.data.columns import holds_ids, holds_times, kind_of_times, values_of
    from shardembed.recipes.data.kinds import ID, USER, WHOLE_TIME, Kind
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
        time: whole numbers, or dates with or without a time of day; None where times are of no interest. The attribute `clock`
            says whether they are dates, and is None where there are none.
        any_user: users may be any integers of 64 bits with a sign, for they have no rows in a table.
        any_id: users and items may be any integers of 64 bits, or texts: the first row of a text file says which.
        names: of users and of items, where texts are to be noted with their ids.
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
        any_id: bool = False,
        names: tuple[Names | None, Names | None] = (None, None),
    ) -> None:
        self._path = Path(path)
        self._columns = (user, item) if time is None else (user, item, time)
        self._kinds: tuple[Kind, ...] = (USER if any_user else ID, ID)
        self._any_id, self._names = any_id, names
        self.clock: bool | None = None
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
                like = tuple(partial(ids_like, names=one) for one in names) if any_id else self._kinds
                self._text = TextFile.open(self._path, DELIMITERS[suffix], self._columns, (like[0], like[1]))
                self._check_columns(self._text.header)
                self._kinds = self._text.kinds
                self.clock = self._text.clock
            else:
                schema = parquet.read_schema(self._path)
                self._check_schema(schema)
                if any_id:
                    self._kinds = tuple(map(self._kind_of, (schema.field(user), schema.field(item)), names))
                if time is not None:
                    kind = self._first_times()
                    self._kinds += (kind or WHOLE_TIME,)
                    self.clock = kind.clock if kind is not None else None
        except (*UNREADABLE, pa.ArrowException) as error:
            raise DataError(f"{self._path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error

    @property
    def name(self) -> str:
        return str(self._path)

    @property
    def parts(self) -> tuple[str]:
        return (self.name,)

    @property
    def texts(self) -> tuple[bool, bool]:
        """Whether users are texts, and items."""
        return self._kinds[0].text, self._kinds[1].text

    @staticmethod
    def _kind_of(field: pa.Field, names: Names | None) -> Kind:
        return texts(names) if pa.types.is_string(plain_type(field.type)) else INTEGER

    def chunks(self, part: int = 0) -> Iterator[Chunk]:
        for (users, items, *times), problems in self._text_rows() if self._text is not None else self._parquet_rows():
            if problems and not self._skip:
                raise DataError(problems[0].text)
            fine = times[1] if len(times) > 1 and times[1].any() else None
            yield Chunk(users, items, Dropped.of(problems), times[0] if times else None, fine)

    def place(self, column: int, value: int) -> str:
        """Where the first row with that user (column 0) or item (1) is: file and line, or row. Reads the file."""
        return next(self._places(column, value), self.name)

    def _places(self, column: int, value: int) -> Iterator[str]:
        said = f"column {self._columns[column]!r}"
        if self._text is not None:
            yield from (f"{self._path}:{line}: {said}" for line in self._text.lines_with(column, value))
            return
        row = 0
        with parquet.ParquetFile(self._path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[self._columns[column]]):
                found = np.flatnonzero(values_of(batch.column(0), self._kinds[column])[0][0] == value)
                yield from (f"{self._path}: row {row + one} (from 0), {said}" for one in found.tolist())
                row += batch.num_rows

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
                self._check_schema(file.schema_arrow)  # it may be another file than on construction
                self._check_same(file.schema_arrow)
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(self._columns)):
                    yield self._judged(batch, row)
                    row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._path}: {error}") from error

    def _judged(self, batch: pa.RecordBatch, first_row: int) -> tuple[np.ndarray, list[Problem]]:
        """The values of the batch's good rows, int64 `[numbers, n]` (of dates two), and what is wrong with the others."""
        kept = np.ones(batch.num_rows, bool)
        problems: dict[int, Problem] = {}
        values = []
        for name, kind in zip(self._columns, self._kinds, strict=True):
            found, wrong = values_of(batch.column(name), kind)
            for row, (what, text) in wrong.items():
                where = f"{self._path}: row {first_row + row} (from 0), column {name!r}"
                # The first thing that is wrong with a row is said, and a row is dropped once.
                problems.setdefault(row, Problem(what, f"{where}: {text}"))
                kept[row] = False
            values.append(found)
        return np.concatenate(values)[:, kept], [problems[row] for row in sorted(problems)]

    def _check_schema(self, schema: pa.Schema) -> None:
        """Of a Parquet file."""
        self._check_columns(list(schema.names))
        for name in self._columns[:2]:
            kind = schema.field(name).type
            if not holds_ids(kind):
                raise DataError(f"{self._path}: column {name!r} holds {kind}; ids must be whole numbers, or texts of their digits")
        for name in self._columns[2:]:
            kind = schema.field(name).type
            if not holds_times(kind):
                raise DataError(
                    f"{self._path}: column {name!r} (data.time) holds {kind}; times must be timestamps, dates, whole numbers, or "
                    "texts of these"
                )

    def _check_same(self, schema: pa.Schema) -> None:
        for name, text in zip(self._columns, self.texts, strict=False):
            if self._any_id and pa.types.is_string(plain_type(schema.field(name).type)) != text:
                raise DataError(f"{self._path}: column {name!r} holds {schema.field(name).type} now: the file has changed")

    def _first_times(self) -> Kind | None:
        """How the times of a Parquet file are written; None where there are none."""
        name = self._columns[-1]
        with parquet.ParquetFile(self._path) as file:
            found = (kind_of_times(batch.column(0)) for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[name]))
            return next((kind for kind in found if kind is not None), None)


class SeveralFiles:
    """The interactions of several files, one file after the other.

    patterns: what named them.

    Raises:
        DataError: on construction, where some have dates and others whole numbers for times, or texts and numbers for ids.
    """

    def __init__(self, files: Sequence[FileInteractions], patterns: Sequence[str]) -> None:
        self._files, self._patterns = files, patterns
        dates = next((file for file in files if file.clock), None)
        numbers = next((file for file in files if file.clock is False), None)
        if dates is not None and numbers is not None:
            raise DataError(
                f"data.time: {dates.name} has dates, but {numbers.name} has whole numbers, which have no order among each other; "
                "write both alike"
            )

        for place, setting in enumerate(SETTINGS[:2]):
            text, number = (next((file.name for file in files if file.texts[place] is kind), None) for kind in (True, False))
            if text is not None and number is not None:
                raise DataError(
                    f"{setting}: {text} has texts, but {number} has whole numbers, and the text 42 is another id than the number "
                    "42; write both alike"
                )

    @property
    def name(self) -> str:
        return named(self._patterns, len(self._files))

    @property
    def parts(self) -> list[str]:
        return [file.name for file in self._files]

    def chunks(self, part: int) -> Iterator[Chunk]:
        return self._files[part].chunks()

    def place(self, column: int, value: int) -> str:
        places = (place for file in self._files for place in file._places(column, value))
        return next(places, self.name)
