"""Text files of the Criteo layout, plain or compressed with gzip, in blocks of whole lines: parsed by pyarrow where all is well,
line by line where it is not.

There are no quotes and no header in them, so a line is a row. A block that pyarrow finds anything wrong with is halved until the
pieces are small; only the bad ones are read slowly, which gives the number of every bad line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import compute
from pyarrow import csv as arrow_csv

from shardembed.errors import DataError
from shardembed.recipes.data.bad import Dropped, Problem
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.criteo.values import INTEGER, REPLACED, categories_of, category, ids_of_texts, problem_of
from shardembed.recipes.data.opening import UNREADABLE, open_text
from shardembed.recipes.data.wanted import MISSING

BLOCK_BYTES = 4 << 20  # of text parsed at a time
PIECE_BYTES = 16 << 10  # that are read line by line where something is wrong
MAX_LINE = 1 << 20
BOM = b"\xef\xbb\xbf"
TAR = slice(257, 262)  # where "ustar" stands in an archive
# pyarrow takes numbers such as 0x1f and ones with blanks around, which are mistakes here.
SUSPECT = (b"x", b"X", b" ", b"+")


@dataclass(frozen=True)
class ClickText:
    """One text file.

    Attributes:
        path: of the file.
        schema: its columns.
    """

    path: Path
    schema: Schema

    def check(self) -> None:
        """Look at the first row.

        Raises:
            DataError: the file cannot be read, or its first row has another number of fields than the schema, or is a header.
        """
        with open_text(self.path) as file:
            line = self._read(file.readline, MAX_LINE + 1, 1)
        if line[TAR] == b"ustar":
            raise DataError(f"{self.path}: is a tar archive; unpack it and name the files in it")
        line = line.removeprefix(BOM)
        if not line.strip():
            return
        fields = line.rstrip(b"\r\n").decode("utf-8", "replace").split("\t")
        problem = problem_of(fields, self.schema, f"{self.path}:1")
        if problem is not None and (len(fields) != len(self.schema.names) or "header" in problem.text):
            raise DataError(problem.text)

    def chunks(self, skip: bool) -> Iterator[Clicks]:
        """All rows.

        Raises:
            DataError: the file cannot be read, or, but with `skip`, a row is bad; names file and line.
        """
        for first_line, data in self._blocks():
            for clicks, problems in self._parsed(data, first_line):
                if problems and not skip:
                    raise DataError(problems[0].text)
                yield replace(clicks, dropped=Dropped.of(problems))

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        """(number of the first line, whole lines)."""
        line, rest = 1, b""
        with open_text(self.path) as file:
            while True:
                read = self._read(file.read, BLOCK_BYTES, line)
                rest += read
                whole = rest.rfind(b"\n") + 1 if read else len(rest)
                if not whole and len(rest) > MAX_LINE:
                    raise DataError(f"{self.path}:{line}: a line of more than {MAX_LINE} bytes is not read; is this a text file?")
                block, rest = rest[:whole], rest[whole:]
                if line == 1:
                    block = block.removeprefix(BOM)
                if block:
                    yield line, block
                line += block.count(b"\n")
                if not read:
                    return

    def _read(self, read: Callable[[int], bytes], size: int, line: int) -> bytes:
        try:
            return read(size)
        except UNREADABLE as error:
            said = getattr(error, "strerror", None) or error
            raise DataError(f"{self.path}: cannot read on at line {line}: {said}; is the file whole?") from error

    def _parsed(self, data: bytes, first_line: int) -> Iterator[tuple[Clicks, list[Problem]]]:
        clicks = self._fast(data)
        middle = data.find(b"\n", len(data) // 2) + 1
        if clicks is not None:
            yield clicks, []
        elif len(data) <= PIECE_BYTES or not 0 < middle < len(data):
            yield self._slow(data, first_line)
        else:
            yield from self._parsed(data[:middle], first_line)
            yield from self._parsed(data[middle:], first_line + data.count(b"\n", 0, middle))

    def _fast(self, data: bytes) -> Clicks | None:
        """The rows when every one is good, else None."""
        any_id = self.schema.any_id
        if (not any_id and any(sign in data for sign in SUSPECT)) or data.count(b"\r") != data.count(b"\r\n"):
            return None
        if not data.strip(b"\r\n"):
            return self._of([], [])
        wrong: list[object] = []

        def note(row: object) -> str:
            wrong.append(row)
            return "skip"

        # Columns go by position: whatever they are called.
        numbers = len(self.schema.integers) + 1
        names = [str(place) for place in range(len(self.schema.names))]
        # Signs that numbers may not have may stand in texts.
        number, category = pa.string() if any_id else pa.int64(), pa.dictionary(pa.int32(), pa.string())
        types = {name: number if place < numbers else category for place, name in enumerate(names)}
        try:
            table = arrow_csv.read_csv(
                pa.BufferReader(data),
                arrow_csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
                arrow_csv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=note),
                arrow_csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
            )
        except pa.ArrowInvalid:
            return None
        columns = [table.column(name).combine_chunks() for name in names]
        if any_id:
            if not all(map(_are_integers, columns[:numbers])):
                return None
            columns[:numbers] = [compute.cast(column, pa.int64()) for column in columns[:numbers]]
        if wrong or columns[0].null_count:
            return None
        labels = columns[0].to_numpy(zero_copy_only=False)
        if len(labels) and (labels.min() < 0 or labels.max() > 1):
            return None
        found = [self._categories(column, name) for column, name in zip(columns[numbers:], self.schema.categories, strict=True)]
        if any(one is None for one in found):
            return None
        integers = [_floats(column) for column in columns[1:numbers]]
        return Clicks(labels.astype(np.int8), _stacked(integers, len(labels), np.float32), _stacked(found, len(labels), np.int64))

    def _slow(self, data: bytes, first_line: int) -> tuple[Clicks, list[Problem]]:
        good: list[list[str]] = []
        problems: list[Problem] = []
        for line, text in enumerate(data.decode("utf-8", "replace").split("\n"), first_line):
            text = text.removesuffix("\r")
            if not text:  # an empty line is no row
                continue
            fields = text.split("\t")
            problem = problem_of(fields, self.schema, f"{self.path}:{line}")
            if problem is None:
                good.append(fields)
            else:
                problems.append(problem)
        numbers = len(self.schema.integers) + 1
        integers = [[float(text) if text else np.nan for text in fields[1:numbers]] for fields in good]
        if self.schema.any_id:
            listed = zip(*(fields[numbers:] for fields in good), strict=True) if good else ()
            columns = [
                ids_of_texts(list(texts), self.schema.books.get(name))
                for texts, name in zip(listed, self.schema.categories, strict=False)
            ]
            categories = np.stack(columns, 1).tolist() if good else []
        else:
            categories = [[category(text) for text in fields[numbers:]] for fields in good]
        found = self._of(integers, categories)
        return Clicks(np.array([int(fields[0]) for fields in good], np.int8), found.numbers, found.ids), problems

    def _categories(self, column: pa.DictionaryArray, name: str) -> np.ndarray | None:
        """A column of categories; None where one of them is none."""
        if not self.schema.any_id:
            return _categories(column)
        found = compute.call_function("match_substring", [column.dictionary], compute.MatchSubstringOptions(REPLACED))
        if found.to_numpy(zero_copy_only=False).any():
            return None
        return ids_of_texts(column, self.schema.books.get(name))

    def _of(self, integers: list[list[float]], categories: list[list[int]]) -> Clicks:
        return Clicks(
            np.zeros(len(integers), np.int8),
            np.array(integers, np.float32).reshape(len(integers), len(self.schema.integers)),
            np.array(categories, np.int64).reshape(len(categories), len(self.schema.categories)),
        )


def _stacked(columns: list, count: int, dtype: type) -> np.ndarray:
    """`[n, columns]`, each row in one piece."""
    found = np.empty((count, len(columns)), dtype)
    for place, column in enumerate(columns):
        found[:, place] = column
    return found


def _are_integers(column: pa.Array) -> bool:
    options = compute.MatchSubstringOptions(f"^{INTEGER.pattern}$")
    return bool(compute.call_function("match_substring_regex", [column.drop_null()], options).to_numpy(zero_copy_only=False).all())


def _floats(column: pa.Array) -> np.ndarray:
    return compute.cast(column, pa.float32(), safe=False).to_numpy(zero_copy_only=False)  # NaN for null


def _categories(column: pa.DictionaryArray) -> np.ndarray | None:
    distinct = categories_of(column.dictionary.to_pylist())
    if distinct is None:
        return None
    places = compute.fill_null(column.indices, len(distinct)).to_numpy(zero_copy_only=False)
    return np.append(distinct, MISSING)[places]
