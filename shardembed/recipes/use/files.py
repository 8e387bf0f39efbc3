"""Small tables in and out: names of users from a file, and answers into one, which is there whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from shardembed.comm.comm import Comm
from shardembed.config.hints import nearest
from shardembed.config.paths import local
from shardembed.embeddings.publish import sync_file
from shardembed.errors import ConfigError, DataError, ExportError
from shardembed.recipes.together import on_all

DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
LINES = (".jsonl", ".ndjson")
OUT = (*DELIMITERS, *PARQUET, *LINES)


def names_in(path: Path, column: str) -> pa.Array:
    """Names from a file, each once: the column of a CSV, TSV or Parquet file, or one name a line of any other.

    Raises:
        DataError: the file cannot be read, has no such column, or a name is missing.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in PARQUET:
            found = parquet.read_table(path, columns=[_checked(path, column, parquet.read_schema(path).names)]).column(0)
        elif suffix in DELIMITERS:
            parse = csv.ParseOptions(delimiter=DELIMITERS[suffix])
            with csv.open_csv(path, parse_options=parse) as head:
                _checked(path, column, head.schema.names)
            # As texts: a column of digits may begin with zeros, and 63 bits would be no float's.
            convert = csv.ConvertOptions(column_types={column: pa.string()}, include_columns=[column], strings_can_be_null=False)
            found = csv.read_csv(path, parse_options=parse, convert_options=convert).column(0)
        else:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            found = pa.chunked_array([pa.array([line.removesuffix("\r") for line in lines if line.strip()], pa.string())])
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error
    joined = found.combine_chunks()
    for row, value in enumerate(joined) if joined.null_count or not pa.types.is_integer(joined.type) else ():
        if not value.is_valid or value.as_py() == "":
            raise DataError(f"{path}: row {row} (from 0): the name is missing; remove the row or fill it in")
    return joined.unique()


def _checked(path: Path, column: str, names: list[str]) -> str:
    if names.count(column) != 1:
        what = f"are {names.count(column)} columns" if column in names else "is no column"
        raise DataError(
            f"{path}: there {what} {column!r}, which holds users in the run's data (data.user){nearest(column, names) or '.'} "
            f"The columns are: {', '.join(names)}"
        )
    return column


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
        ExportError: on all ranks: it cannot be written.
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
        with _told(path):
            writer.put(table)


def _finish(path: Path, writer: _Writer | None, new: Path) -> None:
    if writer is not None:
        with _told(path):
            writer.close()
            sync_file(new)
            os.replace(new, path)


class _Writer:
    def __init__(self, path: Path, suffix: str) -> None:
        self._path, self._suffix = path, suffix
        self._open: Any = None
        self._lines = suffix in LINES

    def put(self, table: pa.Table) -> None:
        if self._open is None:
            if self._lines:
                self._open = self._path.open("x", encoding="utf-8")
            elif self._suffix in PARQUET:
                self._open = parquet.ParquetWriter(self._path, table.schema)
            else:
                self._open = csv.CSVWriter(
                    self._path, table.schema, write_options=csv.WriteOptions(delimiter=DELIMITERS[self._suffix])
                )
        if self._lines:
            for batch in table.to_batches(max_chunksize=1 << 14):
                self._open.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in batch.to_pylist())
        else:
            self._open.write_table(table)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise ExportError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
