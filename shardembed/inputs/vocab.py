"""Rows for raw ids by a vocabulary: the values that occur often enough, in the order of how often they do.

    count     values are counted as they stream by; memory grows with the distinct ones, not with all
    merge     the ranks' counts are added up, so that all of them hold the same vocabulary
    cut       `min_count`, then `max_size`; of equally frequent values the smaller one comes first

The file is text in UTF-8 with a line for each row of the table, so that the value of row n is in line n (from 0) up to the first
tab: `value<TAB>count`, with \\\\, \\t, \\n and \\r written for a backslash, a tab and line ends in a value. Line 0 is the row of
all other values: `\\other<TAB>count<TAB>integers` or `... texts`.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from shardembed.comm.comm import Comm
from shardembed.config.hints import nearest
from shardembed.config.paths import local, whole_file
from shardembed.errors import ConfigError, DataError, DtypeError, InputError
from shardembed.inputs.hashing import Raw

OTHER = 0  # the row of values that are not in the vocabulary
OTHER_LINE = "\\other"
KINDS = ("integers", "texts")
BLOCK_ROWS = 1 << 16
PARQUET = (".parquet", ".pq")


@dataclass(frozen=True, repr=False)  # values and counts may be millions
class Vocabulary:
    """Values with rows of their own, from row 1 on. Row 0 is for all others.

    Make one with `build`, `from_files` or `load`; call it with values (as `se.Hashing` takes them) for their rows.

    Attributes:
        values: integers or texts; the value of row n is `values[n - 1]`.
        counts: how often each occurred.
        other_count: how often others did.
        kind: "integers" or "texts".
    """

    values: tuple[int, ...] | tuple[str, ...]
    counts: tuple[int, ...]
    other_count: int = 0
    kind: str = "integers"

    @property
    def num_embeddings(self) -> int:
        """Rows that a table needs."""
        return len(self.values) + 1

    def __repr__(self) -> str:
        return f"Vocabulary({self.num_embeddings:,} rows of {self.kind})"

    def __call__(self, values: Any) -> Any:
        """The rows of `values`, int64 in their shape, 0 for those that are not in the vocabulary: a torch tensor for a torch
        tensor, else a numpy array.

        Raises:
            DtypeError: texts where the vocabulary has integers, or the reverse. InputError: a value is missing.
        """
        raw = Raw.of(values, "Vocabulary")
        if raw.integers is not None:
            if self.kind != "integers" and raw.integers.size:
                raise DtypeError("Vocabulary: these are integers, but the vocabulary has texts; convert the values to str")
            return raw.like(self._rows_of_integers(raw.integers))
        if self.kind != "texts" and raw.texts:
            raise DtypeError("Vocabulary: these are texts, but the vocabulary has integers; convert the values to int")
        rows = self._rows
        return raw.like(np.fromiter((rows.get(_text(value), OTHER) for value in raw.texts), np.int64, len(raw.texts)))

    def _rows_of_integers(self, integers: np.ndarray) -> np.ndarray:
        ascending, rows = self._ascending
        fits = integers <= np.iinfo(np.int64).max if integers.dtype == np.uint64 else True
        wanted = integers.astype(np.int64)
        places = np.minimum(np.searchsorted(ascending, wanted), max(len(ascending) - 1, 0))
        return np.where((ascending[places] == wanted) & fits, rows[places], OTHER) if len(ascending) else np.zeros_like(wanted)

    @cached_property
    def _ascending(self) -> tuple[np.ndarray, np.ndarray]:
        values = np.array(self.values, np.int64)
        order = np.argsort(values, kind="stable")
        return values[order], order + 1

    @cached_property
    def _rows(self) -> dict[Any, int]:
        return {value: row for row, value in enumerate(self.values, 1)}

    @staticmethod
    def build(source: Iterable[Any], *, min_count: int = 1, max_size: int | None = None, comm: Comm | None = None) -> Vocabulary:
        """Count the values of all arrays in `source`, which is read once. Collective: each rank passes its own share of the values,
        and all get the same vocabulary, which does not depend on who had which.

        Args:
            min_count: values that occur less often have no row of their own.
            max_size: at most so many values, the most frequent ones.

        Raises:
            DtypeError, InputError: what cannot be a value; ConfigError: sizes below 1.
        """
        counts = Counts()
        for values in source:
            counts.add(values)
        return counts.merged(comm or Comm.of()).vocabulary(min_count, max_size)

    @staticmethod
    def from_files(
        paths: str | Path | Sequence[str | Path],
        column: str,
        *,
        min_count: int = 1,
        max_size: int | None = None,
        comm: Comm | None = None,
    ) -> Vocabulary:
        """As `build`, from one column of CSV, TSV (also .gz) or Parquet files, which are dealt to the ranks. Missing values are not
        counted. Collective.

        Raises:
            DataError: a file cannot be read or lacks the column.
        """
        comm = comm or Comm.of()
        listed = [paths] if isinstance(paths, str | Path) else list(paths)
        with comm.preparing("vocabulary"):
            counts = Counts()
            for path in listed[comm.rank :: comm.world_size]:
                for values in _column(local(path, DataError), column):
                    counts.add(values)
        comm.agree("vocabulary", [])
        return counts.merged(comm).vocabulary(min_count, max_size)

    def extended(self, newer: Vocabulary, max_size: int | None = None) -> Vocabulary:
        """These values in the rows that they have, and behind them those of `newer` that have none yet, as many as find room
        where there are to be `max_size` in all. Counts are of both together.

        Raises:
            DtypeError: one has integers and the other texts.
        """
        if self.values and newer.values and self.kind != newer.kind:
            raise DtypeError(
                f"Vocabulary: the values were {self.kind} and the newer ones are {newer.kind}; convert them to one kind"
            )
        counts = dict(zip(self.values, self.counts, strict=True))
        room = None if max_size is None else max(0, max_size - len(counts))
        added = [value for value in newer.values if value not in counts][:room]
        found = dict(zip(newer.values, newer.counts, strict=True))
        values: tuple[Any, ...] = (*self.values, *added)
        together = tuple(counts.get(value, 0) + found.get(value, 0) for value in values)
        rest = sum(newer.counts) - sum(found.get(value, 0) for value in values)
        kind = self.kind if self.values else newer.kind
        return Vocabulary(values, together, self.other_count + newer.other_count + rest, kind)

    def save(self, path: str | Path) -> None:
        """Write the file that the top of the module describes, whole or not at all. Not collective: one rank does it."""
        path = local(path, DataError)
        lines = [f"{OTHER_LINE}\t{self.other_count}\t{self.kind}"]
        lines += [f"{_escaped(str(value))}\t{count}" for value, count in zip(self.values, self.counts, strict=True)]
        with whole_file(path, f"{os.getpid()}.new", errors="surrogatepass", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)

    @staticmethod
    def load(path: str | Path) -> Vocabulary:
        """Read a file that `save` wrote.

        Raises:
            DataError: it cannot be read, or a line is not as `save` writes it; says which.
        """
        try:
            with open(local(path, DataError), encoding="utf-8", errors="surrogatepass", newline="\n") as file:
                head = file.readline().rstrip("\n").split("\t")
                if len(head) != 3 or head[0] != OTHER_LINE or not head[1].isdecimal() or head[2] not in KINDS:
                    raise DataError(
                        f"{path}:1: not a vocabulary: the first line must be {OTHER_LINE!r}, a count and {KINDS}, by tabs"
                    )
                read = _read_lines(file, path, head[2] == "integers")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot read the vocabulary: {getattr(error, 'strerror', None) or error}") from error
        return Vocabulary(tuple(read), tuple(read.values()), int(head[1]), head[2])


@dataclass
class Counts:
    """How often values have occurred so far. Integers are kept as arrays, and merged when as many wait as are merged already.

    Attributes:
        texts: counts by text.
        integers: ascending values and their counts, both int64, of all that is merged.
    """

    texts: Counter[str] = field(default_factory=Counter)
    integers: tuple[np.ndarray, np.ndarray] = field(default_factory=lambda: (np.empty(0, np.int64), np.empty(0, np.int64)))
    _waiting: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _waits: int = 0

    def add(self, values: Any) -> None:
        """Count `values`, as `se.Hashing` takes them; all calls together either integers or texts.

        Raises:
            DtypeError, InputError: what cannot be a value.
        """
        raw = Raw.of(values, "Vocabulary")
        if raw.integers is not None:
            if raw.integers.dtype == np.uint64 and raw.integers.size and raw.integers.max() > np.iinfo(np.int64).max:
                raise InputError("Vocabulary: an integer does not fit into 64 bits with a sign; pass such values as texts")
            found, counts = np.unique(raw.integers.astype(np.int64), return_counts=True)
            self._waiting.append((found, counts))
            self._waits += len(found)
            # Merging costs as much as what is merged, so it waits for as many again: each value is moved a few times in all.
            if self._waits > max(len(self.integers[0]), BLOCK_ROWS):
                self._merge()
        else:
            self.texts.update(map(_text, raw.texts))

    def _merge(self) -> None:
        parts = [self.integers, *self._waiting]
        values, places = np.unique(np.concatenate([part for part, _ in parts]), return_inverse=True)
        counts = np.zeros(len(values), np.int64)
        np.add.at(counts, places.reshape(-1), np.concatenate([part for _, part in parts]))
        self.integers, self._waiting, self._waits = (values, counts), [], 0

    def of_integers(self) -> np.ndarray:
        """How often each integer has occurred, int64, in the order of the integers."""
        self._merge()
        return self.integers[1]

    def merged(self, comm: Comm) -> Counts:
        """The counts of all ranks together. Collective. Every rank holds all ranks' distinct values for a moment."""
        self._merge()
        if comm.world_size == 1:
            return self
        mine = {"integers": [part.tolist() for part in self.integers], "texts": self.texts}
        total = Counts()
        for text in comm.gather_texts("control", "merge vocabularies", json.dumps(mine)):
            told = json.loads(text)
            total.texts.update(told["texts"])
            total._waiting.append((np.array(told["integers"][0], np.int64), np.array(told["integers"][1], np.int64)))
        total._merge()
        return total

    def vocabulary(self, min_count: int = 1, max_size: int | None = None) -> Vocabulary:
        """The values that are frequent enough.

        Raises:
            ConfigError: sizes below 1. DtypeError: there are integers and texts.
        """
        for name, value in (("min_count", min_count), ("max_size", max_size)):
            if value is not None and value < 1:
                raise ConfigError(f"Vocabulary: {name} must be at least 1, not {value}")
        self._merge()
        if len(self.integers[0]) and self.texts:
            raise DtypeError("Vocabulary: there are integers and texts among the values; convert them to one kind")
        if self.texts:
            total = sum(self.texts.values())
            frequent = [(value, count) for value, count in self.texts.items() if count >= min_count]
            frequent.sort(key=lambda pair: (-pair[1], pair[0]))
            values, counts = [value for value, _ in frequent[:max_size]], [count for _, count in frequent[:max_size]]
            return Vocabulary(tuple(values), tuple(counts), total - sum(counts), "texts")
        values, counts = self.integers
        # By count, then by value: the order must not depend on which rank had which values.
        order = np.lexsort((values, -counts))
        order = order[counts[order] >= min_count][:max_size]
        return Vocabulary(
            tuple(values[order].tolist()), tuple(counts[order].tolist()), int(counts.sum() - counts[order].sum()), "integers"
        )


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "surrogateescape")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r")


def unescaped(text: str) -> str | None:
    """The value; None for an escape that `_escaped` does not make."""
    if "\\" not in text:
        return text
    parts = text.split("\\\\")
    for mark, meant in (("\\t", "\t"), ("\\n", "\n"), ("\\r", "\r")):
        parts = [part.replace(mark, meant) for part in parts]
    return None if any("\\" in part for part in parts) else "\\".join(parts)


def _read_lines(lines: Iterable[str], path: str | Path, integers: bool) -> dict[Any, int]:
    read: dict[Any, int] = {}
    for number, line in enumerate(lines, 2):
        text, tab, count = line.rstrip("\n").rpartition("\t")
        value: Any = unescaped(text)
        if integers and value is not None:
            digits = value.removeprefix("-")
            value = int(value) if digits.isdecimal() and digits.isascii() and len(digits) < 20 else None
        if not tab or value is None or not count.isdecimal():
            raise DataError(f"{path}:{number}: not a line of a vocabulary: a value, a tab and a count; was the file edited?")
        if value in read:
            raise DataError(f"{path}:{number}: the value {text!r} stands in another line already")
        read[value] = int(count)
    return read


def _column(path: Path, column: str) -> Iterator[Any]:
    """The values of one column that are not missing, in blocks."""
    try:
        from pyarrow import ArrowException, csv, parquet, string
    except ImportError as error:
        raise DataError("reading data files needs pyarrow: pip install 'shardembed[train]'") from error
    try:
        if path.suffix.lower() in PARQUET:
            with parquet.ParquetFile(path) as file:
                _check_column(path, column, list(file.schema_arrow.names))
                parts = (part.column(0).drop_null() for part in file.iter_batches(BLOCK_ROWS, columns=[column]))
                yield from (_values(part, path, column) for part in parts)
            return
        kind = next((suffix.lower() for suffix in path.suffixes[::-1] if suffix.lower() != ".gz"), "")
        if kind not in (".csv", ".tsv"):
            raise DataError(f"{path}: the suffix tells no known format; use .csv, .tsv (both also with .gz), .parquet or .pq")
        parse = csv.ParseOptions(delimiter="\t" if kind == ".tsv" else ",")
        # A column that looks like numbers would lose its leading zeros: all values of text files are texts.
        convert = csv.ConvertOptions(column_types={column: string()}, strings_can_be_null=True, null_values=[""])
        with csv.open_csv(path, csv.ReadOptions(use_threads=False), parse, convert) as reader:
            _check_column(path, column, reader.schema.names)
            yield from (part.column(column).drop_null() for part in reader)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error


def _values(column: Any, path: Path, name: str) -> Any:
    """Of a column without nulls of a Parquet file: its whole numbers as integers, or its texts."""
    from pyarrow import types

    from shardembed.config.arrow_types import is_number, plain, whole_numbers

    column = plain(column)
    if types.is_string(column.type) or types.is_null(column.type):
        return column
    whole = whole_numbers(column) if is_number(column.type) else None
    if whole is None:
        raise DataError(
            f"{path}: column {name!r} holds {column.type}, and values that are neither texts nor whole numbers (of floats: below "
            "2^53); convert them to one of these"
        )
    return whole


def _check_column(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        near = nearest(column, names) or "."
        raise DataError(f"{path}: there is no column {column!r}{near} The columns are: {', '.join(names) or '(none)'}")
