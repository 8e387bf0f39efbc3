"""Small tables in and out: names of users from a file, and answers into one, which is there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, csv, parquet

from shardembed.checkpoint.folders import sync_folder
from shardembed.comm.comm import Comm
from shardembed.config.paths import local
from shardembed.embeddings.publish import sync_file, told
from shardembed.errors import ConfigError, DataError
from shardembed.recipes.data.as_is import AsIs
from shardembed.recipes.data.opened import open_files
from shardembed.recipes.data.opening import PARQUET_SUFFIXES, TEXT_SUFFIXES, UNREADABLE, Place, open_text
from shardembed.recipes.data.wanted import Wanted
from shardembed.recipes.together import on_all

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson")
LINE_ENDS = re.compile("\r\n|\n|\r")  # and no others: a name may hold what str.splitlines takes for one
OUT = (*DELIMITERS, *PARQUET_SUFFIXES, *LINES)


def names_in(path: str | Path, column: str, skip: bool = False) -> tuple[pa.Array, int]:
    """Names from a file, each once: the column of a CSV, TSV or Parquet file, or one name a line of any other; compressed or not.
    And how many rows were left out.

    Args:
        skip: leave out bad rows and missing names.

    Raises:
        DataError: the file cannot be read, has no such column, or, but with `skip`, a row is bad or a name is missing.
    """
    place = Place(str(path))
    if place.suffix not in (*TEXT_SUFFIXES, *PARQUET_SUFFIXES):
        return _names_of_lines(place).unique(), 0
    files = open_files([str(path)], (Wanted(column, "as_is", "the users of data.user"),), skip, "--users")
    found = [read for part in range(len(files.parts)) for read in files.chunks(part)]
    left_out = sum(len(read.dropped) for read in found)
    joined = pa.chunked_array(
        [one.column for read in found if isinstance(one := read.columns[0], AsIs)] or [pa.array([], pa.string())]
    ).combine_chunks()
    missing = joined.is_null().to_numpy(zero_copy_only=False)
    _check_utf8(joined, f"{path}: column {column!r}")
    if pa.types.is_string(joined.type):
        missing |= compute.call_function("binary_length", [joined]).fill_null(0).to_numpy(zero_copy_only=False) == 0
    if skip:
        return joined.filter(pa.array(~missing)).unique(), left_out + int(missing.sum())
    if missing.any():
        row = int(np.flatnonzero(missing)[0])
        raise DataError(f"{path}: row {row} (from 0): the name is missing; remove the row or fill it in")
    return joined.unique(), 0


def _names_of_lines(place: Place) -> pa.Array:
    try:
        with open_text(place) as file:
            lines = LINE_ENDS.split(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: this is no UTF-8, so it holds no names, one a line: {error.reason}") from error
    except UNREADABLE as error:
        raise DataError(f"{place}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error
    return pa.array([line for line in lines if line.strip()], pa.string())


def check_out(path: Path) -> None:
    """
    Raises:
        ConfigError: no file of that name can be written here.
    """
    if local(path).suffix.lower() not in OUT:
        raise ConfigError(f"--out {path}: the suffix tells the format, one of {', '.join(OUT)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.absolute().parent}")
    if path.is_dir():
        raise ConfigError(f"--out {path}: this is a folder; name a file in it")


@contextmanager
def writing(path: Path, comm: Comm) -> Iterator[Callable[[pa.Table], None]]:
    """Gives what takes tables of one schema, one after the other; rank 0 writes. The file gets its name when the `with` ends well,
    in the place of one that is there. Collective, each of its calls too.

    Raises:
        ExportError: on all ranks: it cannot be written. DataError: a text is no UTF-8, which but CSV and TSV all formats are.
    """
    new = path.with_name(f".writing-{secrets.token_hex(4)}-{path.name}")
    writer = _Writer(new, path.suffix.lower()) if comm.rank == 0 else None

    def put(table: pa.Table) -> None:
        on_all(comm, "write answers", partial(_put, path, writer, table))

    try:
        yield put
        on_all(comm, "write answers", partial(_finish, path, writer, new))
    finally:
        if writer is not None:
            with suppress(Exception):
                writer.close()
            with suppress(OSError):
                new.unlink(missing_ok=True)


def _put(path: Path, writer: _Writer | None, table: pa.Table) -> None:
    if writer is not None:
        with told(path, pa.ArrowException):
            writer.put(table)


def _finish(path: Path, writer: _Writer | None, new: Path) -> None:
    if writer is not None:
        with told(path, pa.ArrowException):
            writer.close()
            sync_file(new)
            os.replace(new, path)
            sync_folder(path.absolute().parent)


class _Writer:
    def __init__(self, path: Path, suffix: str) -> None:
        self._path, self._suffix = path, suffix
        self._open: Any = None
        self._lines = suffix in LINES

    def put(self, table: pa.Table) -> None:
        if self._suffix not in DELIMITERS:  # in which bytes pass as they are
            for name in table.column_names:
                _check_utf8(table.column(name), f"column {name!r}")
        if self._open is None:
            if self._lines:
                self._open = self._path.open("x", encoding="utf-8")
            elif self._suffix in PARQUET_SUFFIXES:
                self._open = parquet.ParquetWriter(self._path, table.schema)
            else:
                self._open = csv.CSVWriter(
                    self._path, table.schema, write_options=csv.WriteOptions(delimiter=DELIMITERS[self._suffix])
                )
        if self._lines:
            for batch in table.to_batches(max_chunksize=1 << 14):
                self._open.writelines(_lines(batch))
        else:
            self._open.write_table(table)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _lines(batch: pa.RecordBatch) -> Iterator[str]:
    """JSON has no inf and nan, as readers other than Python's say: they are null."""
    for row in batch.to_pylist():
        try:
            yield json.dumps(row, ensure_ascii=False, default=str, allow_nan=False) + "\n"
        except ValueError:
            yield json.dumps(_finite(row), ensure_ascii=False, default=str) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_utf8(column: pa.Array | pa.ChunkedArray, where: str) -> None:
    """
    Raises:
        DataError: a text in it is no UTF-8.
    """
    try:
        column.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where} is no UTF-8: {error}; convert the file") from error
