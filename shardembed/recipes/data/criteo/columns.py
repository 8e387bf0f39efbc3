"""Parquet files with the columns of the Criteo layout, by name, in record batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from shardembed.config.arrow_types import plain, plain_type
from shardembed.config.hints import nearest
from shardembed.errors import DataError
from shardembed.inputs.hash64 import hash64
from shardembed.inputs.names import Names
from shardembed.recipes.data.bad import Dropped, Problem
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.criteo.values import CATEGORY, categories_of, ids_of_texts, no_category, no_label, short
from shardembed.recipes.data.wanted import MISSING

BATCH_ROWS = 1 << 15


@dataclass(frozen=True)
class ClickColumns:
    """One Parquet file. Categories are integers, or texts as in text files.

    Attributes:
        path: of the file.
        schema: the columns that are read.
    """

    path: Path
    schema: Schema

    def check(self) -> None:
        """Look at the file's schema.

        Raises:
            DataError: the file cannot be read, or a column is missing or of another type.
        """
        try:
            found = parquet.read_schema(self.path)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error
        self._check_schema(found)

    def _check_schema(self, found: pa.Schema) -> None:
        settings = (
            "data.label",
            *["data.integers"] * len(self.schema.integers),
            *["data.categories"] * len(self.schema.categories),
        )
        for name, setting in zip(self.schema.names, settings, strict=True):
            if found.names.count(name) != 1:
                what = f"are {found.names.count(name)} columns" if name in found.names else "is no column"
                # A column with a part of its own is not meant.
                near = "" if name in found.names else nearest(name, set(found.names) - set(self.schema.names))
                raise DataError(
                    f"{self.path}: there {what} {name!r} ({setting}){near or '.'} The columns are: {', '.join(found.names)}"
                )
            self._check_type(name, found.field(name).type, setting)

    def _check_type(self, name: str, kind: pa.DataType, setting: str) -> None:
        types = pa.types
        value = plain_type(kind)
        fits = types.is_integer(value) or (types.is_boolean(value) and setting == "data.label")
        if setting != "data.label" and types.is_null(value):  # none of this file's rows has one
            return
        if setting == "data.categories":
            fits = fits or types.is_string(value)
        elif types.is_floating(value) or types.is_decimal(value):  # as many writers make of integers where some are missing
            fits = True
        if not fits:
            raise DataError(f"{self.path}: column {name!r} ({setting}) holds {kind}, of which no {setting[5:]} can be made")

    def chunks(self, skip: bool) -> Iterator[Clicks]:
        """All rows.

        Raises:
            DataError: the file cannot be read, or, but with `skip`, a row is bad; names file, row (from 0) and column.
        """
        row = 0
        try:
            with parquet.ParquetFile(self.path) as file:
                self._check_schema(file.schema_arrow)  # it may be another file than when it was checked
                for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=list(self.schema.names)):
                    yield self._judged(batch, row, skip)
                    row += batch.num_rows
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.path}: cannot read on after row {row}: {error}") from error

    def _judged(self, batch: pa.RecordBatch, first_row: int, skip: bool) -> Clicks:
        problems: dict[int, Problem] = {}

        def note(rows: np.ndarray, name: str, kind: str, said: list[str]) -> None:
            for row, text in zip(rows.tolist(), said, strict=True):
                problem = Problem(kind, f"{self.path}: row {first_row + row} (from 0), column {name!r}: {text}")
                problems.setdefault(row, problem)

        labels = _floats(batch.column(self.schema.label))
        bad = np.flatnonzero((labels != 0) & (labels != 1))
        note(bad, self.schema.label, "no label", [no_label(batch.column(self.schema.label)[row].as_py()) for row in bad.tolist()])
        integers = np.empty((batch.num_rows, len(self.schema.integers)), np.float32)
        for place, name in enumerate(self.schema.integers):
            integers[:, place] = values = _floats(batch.column(name))
            bad = np.flatnonzero(np.isinf(values))
            note(bad, name, "not an integer", ["it is infinite; leave missing ones empty"] * len(bad))
        categories = np.empty((batch.num_rows, len(self.schema.categories)), np.int64)
        for place, name in enumerate(self.schema.categories):
            read = partial(_ids, names=self.schema.books.get(name)) if self.schema.any_id else _categories
            categories[:, place], wrong = read(batch.column(name))
            bad = np.flatnonzero(wrong)
            note(bad, name, "no category", [no_category(batch.column(name)[row].as_py()) for row in bad.tolist()])
        if problems and not skip:
            raise DataError(problems[min(problems)].text)
        kept = np.ones(batch.num_rows, bool)
        kept[list(problems)] = False
        found = Clicks(np.nan_to_num(labels).astype(np.int8), integers, categories)[kept]
        return replace(found, dropped=Dropped.of([problems[row] for row in sorted(problems)]))


def _floats(column: pa.Array) -> np.ndarray:
    values = plain(column)
    if pa.types.is_boolean(values.type):
        values = compute.cast(values, pa.int8())
    return compute.cast(values, pa.float32(), safe=False).to_numpy(zero_copy_only=False)  # NaN for null


def _categories(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """int64 `[n]`, and where there is no usable value bool `[n]`."""
    coded = column if pa.types.is_dictionary(column.type) else plain(column).dictionary_encode()
    values = plain(coded.dictionary)
    count = len(values)
    wrong = np.zeros(count + 1, bool)
    if pa.types.is_integer(values.type):
        listed = values.to_pylist()
        wrong[:count] = [value > np.iinfo(np.int64).max or value == MISSING for value in listed]
        distinct = np.array([0 if bad else value for value, bad in zip(listed, wrong.tolist(), strict=False)], np.int64)
    else:
        listed = ["" if text is None else text for text in values.to_pylist()]
        wrong[:count] = [not CATEGORY.fullmatch(text) and text != "" for text in listed]
        usable = [text if text and not bad else "0" for text, bad in zip(listed, wrong.tolist(), strict=False)]
        found = categories_of(usable)
        assert found is not None, short(usable)
        distinct = np.where(np.array([text == "" for text in listed], bool), MISSING, found)
    places = compute.fill_null(compute.cast(coded.indices, pa.int64()), count).to_numpy(zero_copy_only=False)
    return np.append(distinct, MISSING)[places], wrong[places]


def _ids(column: pa.Array, names: Names | None) -> tuple[np.ndarray, np.ndarray]:
    """As `_categories`, of any integers of 64 bits and any texts."""
    values = plain(column)
    if pa.types.is_integer(values.type):
        found = hash64(values, null=MISSING)
        return found, (found == MISSING) & values.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_null(values.type):
        return np.full(len(values), MISSING), np.zeros(len(values), bool)
    return ids_of_texts(values, names), np.zeros(len(values), bool)
