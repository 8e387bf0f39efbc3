"""A column of metadata for rows of a table: from a CSV, TSV or Parquet file, by id or by name, a block of the file at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shardembed.config.hints import nearest
from shardembed.config.optional import needed
from shardembed.config.shown import beginning
from shardembed.errors import DataError
from shardembed.inputs.hash64 import hash64

PARQUET, TEXT = (".parquet", ".pq"), {".csv": ",", ".tsv": "\t"}
BLOCK_ROWS = 1 << 16
FEW = 8  # categories are told apart, the most frequent ones; so are as few distinct numbers
SHOWN = 3  # keys in a message
INTEGER = r"^(0|-?[1-9][0-9]{0,17})$"


@dataclass(frozen=True)
class Metadata:
    """Values of some rows of a table.

    Attributes:
        column: where they are from.
        values: of each row asked for, in its order; None where the file has none.
        numbers: they are numbers of which there are more than `FEW`, else categories.
    """

    column: str
    values: tuple[str | float | None, ...]
    numbers: bool

    @property
    def frequent(self) -> list[str]:
        """The `FEW` most frequent categories; equally frequent ones by their order."""
        counts = Counter(str(value) for value in self.values if value is not None)
        return sorted(counts, key=lambda value: (-counts[value], value))[:FEW]


def metadata_of(
    path: Path, column: str, ids: torch.Tensor, names: Mapping[int, str] | None = None, key: str | None = None
) -> Metadata:
    """The values of a column for the rows `ids`, int64.

    The key of a line of the file is the name that `names` has of a row, or else its id: an integer, or a text of which it is the
    `se.hash64`. Lines of other rows are passed over.

    Args:
        key: the column of keys; by default the first one.

    Raises:
        DataError: the file cannot be read or has no such column, the column holds something else than a value a line, two lines of
            a row differ, or no line is of any of these rows.
    """
    with needed("pyarrow", "train", "reading metadata"):
        import pyarrow  # noqa: F401
    places: dict[Any, list[int]] = {}
    for place, row in enumerate(ids.tolist()):
        places.setdefault(row if names is None else names[row], []).append(place)
    found = _Found(path, column, [None] * len(ids))
    for keys, values in _blocks(path, column, key):
        found.example.extend(map(str, keys[: SHOWN - len(found.example)].to_pylist()))
        for wanted in _wanted(keys, places, names is not None):
            for row, line in wanted:
                found.put(places[row], values[line].as_py(), row)
    if not any(value is not None for value in found.values):
        raise DataError(_nothing(path, column, found.example, list(places), key))
    return _typed(column, found.values)


@dataclass
class _Found:
    path: Path
    column: str
    values: list[Any]
    example: list[str] = field(default_factory=list)

    def put(self, places: Sequence[int], value: Any, row: Any) -> None:
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            return
        before = self.values[places[0]]
        if before is not None and before != value:
            what = f"{self.path}: {row!r} has two values in column {self.column!r}"
            raise DataError(f"{what}, {beginning(str(before), 40)!r} and {beginning(str(value), 40)!r}; leave one")
        for place in places:
            self.values[place] = value


def _wanted(keys: Any, places: Mapping[Any, Sequence[int]], by_name: bool) -> Iterator[Iterable[tuple[Any, int]]]:
    """Of a block of keys those that are wanted, each with its line of the block."""
    import pyarrow as pa
    from pyarrow import compute, types

    if by_name:
        texts = keys.cast(pa.string())
        there = compute.call_function("is_in", [texts], compute.SetLookupOptions(pa.array(list(places), pa.string())))
        lines = np.flatnonzero(there.to_numpy(zero_copy_only=False))
        yield [(texts[line].as_py(), int(line)) for line in lines]
        return
    wanted, lines = np.fromiter(places, np.int64, len(places)), np.arange(len(keys))
    if not types.is_integer(keys.type):
        # What is written as an integer may be one, or the text of one.
        whole = compute.call_function("match_substring_regex", [keys], compute.MatchSubstringOptions(INTEGER))
        numbers = keys.filter(whole).cast(pa.int64()).to_numpy(zero_copy_only=False)
        yield _among(numbers, lines[whole.to_numpy(zero_copy_only=False)], wanted)
    yield _among(np.asarray(hash64(keys)), lines, wanted)


def _among(ids: np.ndarray, lines: np.ndarray, wanted: np.ndarray) -> list[tuple[int, int]]:
    return [(int(ids[place]), int(lines[place])) for place in np.flatnonzero(np.isin(ids, wanted))]


def _blocks(path: Path, column: str, key: str | None) -> Iterator[tuple[Any, Any]]:
    """Keys, none of them null, and values, as arrays of Arrow; of text files all are texts."""
    from pyarrow import ArrowException, csv, parquet, string

    try:
        if path.suffix.lower() in PARQUET:
            with parquet.ParquetFile(path) as file:
                name = _checked(path, column, key, list(file.schema_arrow.names))
                for part in file.iter_batches(BLOCK_ROWS, columns=list(dict.fromkeys((name, column)))):
                    part = part.filter(part.column(name).is_valid())
                    yield _plain(path, name, part.column(name), True), _plain(path, column, part.column(column), False)
            return
        kind = next((suffix.lower() for suffix in path.suffixes[::-1] if suffix.lower() != ".gz"), "")
        if kind not in TEXT:
            raise DataError(f"{path}: the suffix tells no known format; use .csv, .tsv (both also with .gz), .parquet or .pq")
        parse = csv.ParseOptions(delimiter=TEXT[kind])
        with csv.open_csv(path, csv.ReadOptions(use_threads=False), parse) as reader:
            name = _checked(path, column, key, reader.schema.names)
        kinds = csv.ConvertOptions(column_types={name: string(), column: string()}, strings_can_be_null=True, null_values=[""])
        with csv.open_csv(path, csv.ReadOptions(use_threads=False), parse, kinds) as reader:
            filled = (part.filter(part.column(name).is_valid()) for part in reader)
            yield from ((part.column(name), part.column(column)) for part in filled)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path}: cannot read the file: {getattr(error, 'strerror', None) or error}") from error


def _checked(path: Path, column: str, key: str | None, names: Sequence[str]) -> str:
    """The column of keys."""
    for name in (column, *([] if key is None else [key])):
        if name not in names:
            near = nearest(name, names) or "."
            raise DataError(f"{path}: there is no column {name!r}{near} The columns are: {', '.join(names) or '(none)'}")
        if list(names).count(name) > 1:
            raise DataError(f"{path}: {list(names).count(name)} columns are named {name!r}; rename all but one")
    return names[0] if key is None else key


def _plain(path: Path, name: str, column: Any, is_key: bool) -> Any:
    """Keys as integers or texts; values as numbers or texts."""
    import pyarrow as pa
    from pyarrow import types

    from shardembed.config.arrow_types import is_number, plain, whole_numbers

    column = plain(column)
    kind = column.type
    if types.is_nested(kind) or types.is_binary(kind):
        raise DataError(f"{path}: column {name!r} holds {kind}; name one with a text or a number a line")
    if not is_key and is_number(kind):
        return column.cast(pa.float64(), safe=False)
    if is_key and is_number(kind):
        whole = whole_numbers(column)
        if whole is None:
            raise DataError(f"{path}: column {name!r} holds {kind}, and numbers that are no ids; name the column of ids or names")
        return whole
    return column.cast(pa.string())


def _typed(column: str, values: Sequence[Any]) -> Metadata:
    """Texts that are all numbers become numbers; few distinct ones are categories."""
    try:
        numbers = [None if value is None else float(value) for value in values]
    except ValueError:
        return Metadata(column, tuple(values), False)
    distinct = {value for value in numbers if value is not None}
    if len(distinct) <= FEW or not all(map(math.isfinite, distinct)):
        return Metadata(column, tuple(None if value is None else _said(value) for value in values), False)
    return Metadata(column, tuple(numbers), True)


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _nothing(path: Path, column: str, example: Sequence[str], wanted: Sequence[Any], key: str | None) -> str:
    keys, rows = (", ".join(beginning(str(each), 24) for each in some[:SHOWN]) or "nothing" for some in (example, wanted))
    by = "the first column" if key is None else f"column {key!r}"
    return (
        f"{path}: no line has a value in column {column!r} for any of the {len(wanted):,} rows drawn. Keys in {by} are {keys}, and "
        f"the rows are {rows}; name the column of ids or names by `key`, and what rows are called by `names`"
    )
