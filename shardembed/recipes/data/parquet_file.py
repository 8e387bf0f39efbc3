"""Some columns of a Parquet file, whatever types they have there, in record batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from shardembed.config.arrow_types import is_number, plain, plain_type
from shardembed.config.paths import is_url
from shardembed.errors import DataError
from shardembed.recipes.data.bad import Problem
from shardembed.recipes.data.feature_kinds import is_list
from shardembed.recipes.data.kinds import CLOCK_TIME, WHOLE_TIME, Kind, clock_numbers, is_clock, times_like
from shardembed.recipes.data.lists import Values, has
from shardembed.recipes.data.opening import Place
from shardembed.recipes.data.text import Columns, Parsed
from shardembed.recipes.data.wanted import ANY_IDS, Wanted

BATCH_ROWS = 1 << 16
BUFFER_BYTES = 1 << 20  # of a column that are read at once
IDS = "ids must be whole numbers, or texts"
HOLDS = {  # what a column must hold
    "row": "ids must be whole numbers, or texts of their digits",
    "user": "ids must be whole numbers, or texts of their digits",
    "key": IDS,
    "id": IDS,
    "hex": "categories must be whole numbers, or texts of 1 to 8 hexadecimal digits",
    "ids": "lists of ids must be lists of whole numbers or texts, or texts with a separator",
    "number": "numbers must be numbers, or texts of these",
    "label": "labels must be 0 or 1, true or false",
    "as_is": "it may be anything",
    "time": "times must be timestamps, dates, whole numbers, or texts of these",
}


@dataclass(frozen=True)
class ParquetFile:
    """
    Attributes:
        place: of the file.
        schema: of its columns, when it was opened.
    """

    place: Place
    schema: pa.Schema

    @staticmethod
    def open(place: Place) -> ParquetFile:
        """Read the schema.

        Raises:
            DataError: the file cannot be read.
        """
        with _opened(place) as file:
            return ParquetFile(place, file.schema_arrow)

    @property
    def header(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    @property
    def hint(self) -> str:
        return ""

    def check(self, wanted: Wanted, schema: pa.Schema | None = None) -> None:
        """
        Raises:
            DataError: nothing of what is wanted can be made of the column's type.
        """
        kind = (schema or self.schema).field(wanted.name).type
        if not _fits(kind, wanted):
            said = (
                HOLDS[wanted.kind] if wanted.kind != "ids" or not _is_text(kind) else "say what stands between two by `separator`"
            )
            raise DataError(f"{self.place}: column {wanted.name!r} ({wanted.setting}) holds {kind}; {said}")

    def are_texts(self, name: str) -> bool | None:
        """Whether the column, or the lists in it, hold texts; None where there are only nulls."""
        value = _element_type(self.schema.field(name).type)
        return None if pa.types.is_null(value) else pa.types.is_string(value)

    def times(self, name: str) -> Kind | None:
        """How the times of a column are written; None where there are none."""
        value = plain_type(self.schema.field(name).type)
        if is_clock(value):
            return CLOCK_TIME
        if not pa.types.is_string(value):
            return None if pa.types.is_null(value) else WHOLE_TIME
        with _opened(self.place) as file:
            for batch in _batches(file, [name], self.place):
                texts = plain(batch.column(0)).view(pa.binary()).to_pylist()
                first = next(filter(None, texts), None)
                if first is not None:
                    return times_like(first.decode("utf-8", "replace"))
        return None

    def first(self, names: Sequence[str], rows: int) -> dict[str, pa.Array]:
        """Of some columns at most so many of the first rows."""
        with _opened(self.place) as file:
            batch = next(file.iter_batches(batch_size=rows, columns=list(names)), None)
        return {name: pa.nulls(0) if batch is None else batch.column(name) for name in names}

    def rows(self, columns: Columns, wanted: Sequence[Wanted]) -> Iterator[Parsed]:
        """Batch by batch."""
        row = 0
        with _opened(self.place) as file:
            # It may be another file than when it was opened.
            for one, (_, kind) in zip(wanted, columns, strict=True):
                self._check_same(file.schema_arrow, one, kind)
            for batch in _batches(file, [name for name, _ in columns], self.place):
                yield self._judged(batch, row, columns)
                row += batch.num_rows

    def places(self, columns: Columns, column: int, value: int) -> Iterator[str]:
        """Where good rows are that have `value` in one of `columns`."""
        row, (name, kind) = 0, columns[column]
        with _opened(self.place) as file:
            for batch in _batches(file, [name], self.place):
                kept, _, (values, *_) = read_arrays([plain(batch.column(0))], [(name, kind)])
                for one in kept[has(values, value)].tolist():
                    yield f"{self.place}: row {row + one} (from 0), column {name!r}"
                row += batch.num_rows

    def _check_same(self, schema: pa.Schema, wanted: Wanted, kind: Kind) -> None:
        if schema.names.count(wanted.name) != 1:
            raise DataError(f"{self.place}: there is no column {wanted.name!r} any more: the file has changed")
        self.check(wanted, schema)
        found = schema.field(wanted.name).type
        if wanted.kind in ANY_IDS and pa.types.is_string(_element_type(found)) and not kind.text:
            raise DataError(f"{self.place}: column {wanted.name!r} holds {found} now: the file has changed")

    def _judged(self, batch: pa.RecordBatch, first_row: int, columns: Columns) -> Parsed:
        kept, wrong, values = read_arrays([plain(batch.column(name)) for name, _ in columns], columns)
        problems = []
        for row in sorted(wrong):
            name, kind, said = wrong[row]
            problems.append(Problem(kind, f"{self.place}: row {first_row + row} (from 0), column {name!r}: {said}"))
        return len(kept), values, problems


def read_arrays(arrays: list[pa.Array], columns: Columns) -> tuple[np.ndarray, dict[int, tuple[str, str, str]], list[Values]]:
    """Of plain columns of one length: the good rows int64 `[n]`, (column, kind, sentence) of what is wrong with each of the others,
    and the values of the good ones.
    """
    count = len(arrays[0])
    values = [kind.of(array) for array, (_, kind) in zip(arrays, columns, strict=True)]
    wrong: dict[int, tuple[str, str, str]] = {}
    for array, found, (name, kind) in zip(arrays, values, columns, strict=True):
        # The first thing that is wrong with a row is said, and a row is dropped once.
        for row, (what, said) in () if found is not None else _problems(array, kind):
            wrong.setdefault(row, (name, what, said))
    kept = np.delete(np.arange(count), sorted(wrong))
    chosen = []
    for array, found, (_, kind) in zip(arrays, values, columns, strict=True):
        if found is None:
            some = array.take(pa.array(kept))
            found = kind.of(some)
            chosen.append(found if found is not None else kind.slow(_listed(some)))
        else:
            chosen.append(_picked(found, kept) if wrong else found)
    return kept, wrong, chosen


def _picked(values: Values, rows: np.ndarray) -> Values:
    return values[:, rows] if isinstance(values, np.ndarray) and values.ndim > 1 else values[rows]


def _problems(array: pa.Array, kind: Kind) -> Iterator[tuple[int, tuple[str, str]]]:
    if is_clock(array.type) and kind.clock:
        for row in np.flatnonzero(clock_numbers(array)[1]).tolist():
            yield row, _no_clock(array[row].is_valid)
        return
    for row, value in enumerate(_listed(array)):
        if (found := kind.problem(value)) is not None:
            yield row, found


def _no_clock(valid: bool) -> tuple[str, str]:
    if valid:
        return "too large", "the time is more than 292,000 years away; is the unit of the column right?"
    return "missing", "the value is missing; remove the row or fill it in"


def _listed(array: pa.Array) -> list[object]:
    return (array.view(pa.binary()) if pa.types.is_string(array.type) else array).to_pylist()


@contextmanager
def _opened(place: Place) -> Iterator[parquet.ParquetFile]:
    """
    Raises:
        DataError: the file cannot be opened, or read on.
    """
    try:
        with place.open() as raw, _parquet(raw, place) as file:
            yield file
    except (OSError, pa.ArrowException) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{place}: cannot read the file: {said}; is it a Parquet file, and whole?") from error


def _parquet(raw: IO[bytes], place: Place) -> parquet.ParquetFile:
    """Read column by column as it goes; from elsewhere a row group at once, for each read takes long there. Left to itself pyarrow
    would begin by reading all of the file.
    """
    return parquet.ParquetFile(raw, pre_buffer=is_url(place.path), buffer_size=0 if is_url(place.path) else BUFFER_BYTES)


def _batches(file: parquet.ParquetFile, names: list[str], place: Place) -> Iterator[pa.RecordBatch]:
    groups = [[group] for group in range(file.num_row_groups)] if is_url(place.path) else [None]
    for group in groups:
        yield from file.iter_batches(batch_size=BATCH_ROWS, row_groups=group, columns=names)


def _element_type(kind: pa.DataType) -> pa.DataType:
    return plain_type(kind.value_type) if is_list(kind) else plain_type(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(plain_type(kind))


def _fits(kind: pa.DataType, wanted: Wanted) -> bool:
    if wanted.kind == "as_is":
        return True
    if wanted.kind == "ids":
        value = _element_type(kind)
        return is_number(value) or pa.types.is_null(value) or (_is_text(value) and (is_list(kind) or wanted.separator is not None))
    if is_list(kind):
        return False
    value = plain_type(kind)
    types = pa.types
    if types.is_null(value) or types.is_string(value) or types.is_integer(value):
        return True
    if wanted.kind == "time":
        return is_clock(value) or is_number(value)
    if wanted.kind == "hex":
        return False
    return is_number(value) or (types.is_boolean(value) and wanted.kind in ("label", "number", "id"))
