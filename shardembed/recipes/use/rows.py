"""Rows that are to be scored, from files or from a table in memory, with columns of theirs to be carried along.

What a column of ids holds, texts or integers, is what it held in training: a file of ten rows would often say otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from shardembed.config.arrow_types import plain
from shardembed.config.hints import nearest
from shardembed.errors import ConfigError, DataError
from shardembed.recipes.data.as_is import AS_IS, AsIs, carried
from shardembed.recipes.data.bad import Dropped, Problem
from shardembed.recipes.data.clicks.reads import wanted
from shardembed.recipes.data.deciding import FIXED, kind_of_ids
from shardembed.recipes.data.kinds import Kind
from shardembed.recipes.data.naming import had_texts
from shardembed.recipes.data.opened import Files, open_files
from shardembed.recipes.data.parquet_file import read_arrays
from shardembed.recipes.data.wanted import ANY_IDS, Read, Wanted
from shardembed.recipes.run_folder import NAMES
from shardembed.recipes.use.opened import Opened

DATA = "--data"


@dataclass(frozen=True)
class Columns:
    """What is read of each row.

    Attributes:
        wanted: by the model.
        kinds: of these.
        along: names of what is carried along.
    """

    wanted: tuple[Wanted, ...]
    kinds: tuple[Kind, ...]
    along: tuple[str, ...]

    @staticmethod
    def of(opened: Opened, along: Sequence[str]) -> Columns:
        """
        Raises:
            ConfigError: a column is to be carried twice.
        """
        twice = next((name for name in along if list(along).count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"columns: {twice!r} is named twice")
        columns = _wanted(opened)
        return Columns(columns, tuple(_kind(opened, one) for one in columns), tuple(along))

    @property
    def all(self) -> tuple[Wanted, ...]:
        """With those that are only carried."""
        names = {one.name for one in self.wanted}
        return (*self.wanted, *(Wanted(name, "as_is", "--columns") for name in self.along if name not in names))

    @property
    def all_kinds(self) -> tuple[Kind, ...]:
        kinds = (carried(kind) if one.name in self.along else kind for one, kind in zip(self.wanted, self.kinds, strict=True))
        return (*kinds, *(AS_IS for _ in self.all[len(self.wanted) :]))

    def parted(self, read: Read) -> Rows:
        values, along = [], {}
        for one, column in zip(self.all, read.columns, strict=True):
            if isinstance(column, AsIs):
                along[one.name] = column.column
            values.append(column.values if isinstance(column, AsIs) else column)
        return Rows(Read(tuple(values[: len(self.wanted)]), read.dropped), pa.table({name: along[name] for name in self.along}))


@dataclass(frozen=True)
class Rows:
    """Consecutive good rows.

    Attributes:
        read: what the model takes of them.
        along: what is carried along.
    """

    read: Read
    along: pa.Table

    def __len__(self) -> int:
        return len(self.read.columns[0])


def rows_of_files(opened: Opened, paths: Sequence[str], columns: Columns, skip: bool) -> Iterator[Rows]:
    """
    Raises:
        DataError: a file or a column is missing, or, but with `skip`, a row is bad; says where.
    """
    files = _opened(opened, paths, columns, skip)
    for part in range(len(files.parts)):
        yield from map(columns.parted, files.chunks(part))


def _opened(opened: Opened, paths: Sequence[str], columns: Columns, skip: bool) -> Files:
    if opened.scorer is None or opened.config.data.features:
        return replace(open_files(list(paths), columns.all, skip, DATA), kinds=columns.all_kinds)
    # Of the Criteo layout, whose text files have no names of columns.
    found = opened.scorer.open(tuple(paths), DATA, skip).files
    assert isinstance(found, Files)
    return replace(found, wanted=columns.all, kinds=columns.all_kinds)


def rows_of_table(table: pa.Table, columns: Columns, skip: bool) -> Iterator[Rows]:
    """As `rows_of_files`."""
    for one in columns.all:
        if table.column_names.count(one.name) != 1:
            near = nearest(one.name, table.column_names) or "."
            raise DataError(
                f"there is no column {one.name!r} ({one.setting}){near} The columns are: {', '.join(table.column_names)}"
            )
    names = [one.name for one in columns.all]
    first = 0
    for batch in table.select(names).to_batches(max_chunksize=1 << 16):
        kinds = list(zip(names, columns.all_kinds, strict=True))
        _, wrong, values = read_arrays([plain(batch.column(name)) for name in names], kinds)
        problems = [
            Problem(wrong[row][1], f"row {first + row} (from 0), column {wrong[row][0]!r}: {wrong[row][2]}")
            for row in sorted(wrong)
        ]
        if problems and not skip:
            raise DataError(problems[0].text)
        first += batch.num_rows
        yield columns.parted(Read(tuple(values), Dropped.of(problems)))


def as_table(rows: Any) -> pa.Table:
    """A table of what a user holds: Arrow, pandas, a dict of columns, or a list of dicts.

    Raises:
        DataError: it is none of these.
    """
    try:
        if isinstance(rows, pa.Table):
            return rows
        if isinstance(rows, pa.RecordBatch):
            return pa.Table.from_batches([rows])
        if isinstance(rows, dict):
            return pa.table(rows)
        if isinstance(rows, list):
            return pa.Table.from_pylist(rows)
        return pa.Table.from_pandas(rows, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"rows must be files, an Arrow table, a DataFrame, a dict of columns or a list of dicts: {error}") from None


def _wanted(opened: Opened) -> tuple[Wanted, ...]:
    config = opened.config.data
    if opened.scorer is None:
        kind = "user" if config.any_ids is None else "key"  # any integer is one, and may be unknown
        return Wanted(config.user, kind, "data.user"), Wanted(config.item, kind, "data.item")
    return wanted(config, labelled=False)


def _kind(opened: Opened, one: Wanted) -> Kind:
    if one.kind not in ANY_IDS:
        return FIXED[one.kind]
    if opened.scorer is None:
        side = opened.users if one.setting == "data.user" else opened.items
        texts = side.names is not None
    else:
        texts = had_texts(opened.path / NAMES, one.name)
    return kind_of_ids(one, one.text or texts)
