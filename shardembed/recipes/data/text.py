"""Some columns of a CSV or TSV file, plain or compressed with gzip, in blocks of whole lines: parsed by pyarrow where all is well,
line by line where it is not.

A block that pyarrow finds anything wrong with is cut into pieces, and only the pieces that are still bad are read slowly. That
gives the number of every bad line without reading the file twice, and keeps an unclosed quote from swallowing the lines after it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from shardembed.errors import DataError
from shardembed.recipes.data.bad import FIELDS, Problem
from shardembed.recipes.data.kinds import ID, Kind, times_like
from shardembed.recipes.data.opening import open_text

BLOCK_BYTES = 4 << 20  # of text parsed at a time
PIECE_BYTES = 16 << 10  # that are read line by line where something is wrong
PIECES = 16  # into which a block with something wrong is cut, and cut again
MAX_LINE = 16 << 20
CUTS_TRIED = 64
END = "end"
Like = Kind | Callable[[str], Kind]  # or what tells it by the first value
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFile:
    """A file of delimited text with a header line; the columns of it that are read, and what they hold.

    Attributes:
        path: of the file.
        delimiter: between values.
        names: of the columns that are read.
        header: the names of all columns.
        header_lines: how many lines the header takes.
        kinds: of the columns that are read.
        clock: the third column has dates; None where there is none, or no row has a time.
    """

    path: Path
    delimiter: str
    names: tuple[str, ...]
    header: list[str]
    header_lines: int
    kinds: tuple[Kind, ...] = (ID, ID)
    clock: bool | None = None

    @staticmethod
    def open(path: Path, delimiter: str, names: tuple[str, ...], like: tuple[Like, Like] = (ID, ID)) -> TextFile:
        """Read the header, and the first row with a time: it says how times are written, which a third column holds.

        like: what users and items are, by the first of them; asked with an empty text where the column is missing, or empty.

        Raises:
            DataError, or any of opening.UNREADABLE: the file or its first line cannot be read.
        """
        with io.TextIOWrapper(open_text(path), encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter)
            try:
                header = next(rows, [])
            except csv.Error as error:
                raise DataError(f"{path}:1: the header cannot be read: {error}; is this a text file?") from error
            lines = rows.line_num
            if not any(name.strip() for name in header):
                what = "the first line is empty" if lines else "the file is empty"
                raise DataError(f"{path}:1: {what}; the first line of a text file must have the names of its columns")
        found = TextFile(path, delimiter, names, header, lines)
        ids = tuple(one if isinstance(one, Kind) else one(found._first_of(name)) for one, name in zip(like, names, strict=False))
        if len(names) == 2 or names[2] not in header:
            return replace(found, kinds=ids)
        first = found._first_of(names[2])
        kind = times_like(first)
        return replace(found, kinds=(*ids, kind), clock=kind.clock if first else None)

    def rows(self) -> Iterator[tuple[np.ndarray, list[Problem]]]:
        """Block by block: the values of the good rows, int64 `[numbers, n]` (of dates two), and what is wrong with the others."""
        for first_line, data in self._blocks():
            yield from self._parsed(data, first_line)

    def lines_with(self, column: int, value: int) -> Iterator[int]:
        """The lines of good rows that have `value` in a column, by its place among `names`."""
        kind, place = self.kinds[column], self.header.index(self.names[column])
        for first_line, data in self._blocks():
            if not any((values[column] == value).any() for values, _ in self._parsed(data, first_line)):
                continue
            for line, row in self._split(list(io.StringIO(data.decode("utf-8", "replace"), newline=""))):
                if row is not None and self._judge(row, "") is None and kind.value(row[place]) == (value,):
                    yield first_line + line

    def _blocks(self) -> Iterator[tuple[int, bytes]]:
        """(number of the first line, whole lines), the header left out."""
        line, rest, skip = 1, b"", self.header_lines
        with open_text(self.path) as file:
            ended = False
            while not ended:
                read = file.read(BLOCK_BYTES)
                ended = not read
                rest += read
                whole = len(rest) if ended else _whole_lines(rest)
                if not whole and len(rest) > MAX_LINE:
                    raise DataError(f"{self.path}:{line}: a line of more than {MAX_LINE} bytes is not read; is this a text file?")
                block, rest = rest[:whole], rest[whole:]
                if line == 1:
                    block = block.removeprefix(BOM)
                lines = _line_count(block)
                if skip:
                    kept = block.splitlines(keepends=True)[skip:]
                    skip, line, block = max(0, skip - lines), line + min(skip, lines), b"".join(kept)
                    lines = len(kept)
                if block:
                    yield line, block
                line += lines

    def _parsed(self, data: bytes, first_line: int) -> Iterator[tuple[np.ndarray, list[Problem]]]:
        ids = self._fast(data)
        if ids is not None:
            yield ids, []
        elif len(data) <= PIECE_BYTES:
            yield self._slow(data, first_line)
        else:
            size = max(PIECE_BYTES, len(data) // PIECES)
            while data:
                whole = _whole_lines(data[:size]) or len(data)  # a line longer than a piece comes with all that follows it
                if whole == len(data) > size:
                    yield self._slow(data, first_line)
                else:
                    yield from self._parsed(data[:whole], first_line)
                first_line += _line_count(data[:whole])
                data = data[whole:]

    def _fast(self, data: bytes) -> np.ndarray | None:
        """The values int64 `[numbers, n]` when every row is good, else None."""
        places = [str(self.header.index(name)) for name in self.names]
        wrong: list[object] = []

        def note(row: object) -> str:
            wrong.append(row)
            return "skip"

        # Columns go by position: names may repeat. Numbers are read as text, so that a bad value can be told from a bad file.
        names = [str(place) for place in range(len(self.header))]
        if not data.endswith((b"\n", b"\r")):
            data += b"\n"
        data += self._end.encode()
        try:
            convert = arrow_csv.ConvertOptions(check_utf8=False, strings_can_be_null=False)
            convert.include_columns, convert.column_types = places, dict.fromkeys(places, pa.string())
            table = arrow_csv.read_csv(
                pa.BufferReader(data),
                arrow_csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=names),
                arrow_csv.ParseOptions(delimiter=self.delimiter, invalid_row_handler=note),
                convert,
            )
        except pa.ArrowInvalid:
            return None
        columns = [table.column(place).combine_chunks() for place in places]
        count = table.num_rows - 1
        if wrong or count < 0 or columns[0].view(pa.binary())[count].as_py() != END.encode():
            return None
        found = []
        for column, kind in zip(columns, self.kinds, strict=True):
            values = kind.fast(column[:count])
            if values is None:
                return None
            found.append(values)
        return np.concatenate(found)

    def _slow(self, data: bytes, first_line: int) -> tuple[np.ndarray, list[Problem]]:
        good: list[list[int]] = []
        problems: list[Problem] = []
        for line, row in self._split(list(io.StringIO(data.decode("utf-8", "replace"), newline=""))):
            problem = self._judge(row, f"{self.path}:{first_line + line}")
            if problem is not None:
                problems.append(problem)
            elif row is not None:
                values = (kind.value(row[self.header.index(name)]) for name, kind in zip(self.names, self.kinds, strict=True))
                good.append([number for value in values for number in value])
        return np.array(good, np.int64).reshape(-1, sum(kind.numbers for kind in self.kinds)).T, problems

    def _judge(self, row: list[str] | None, where: str) -> Problem | None:
        if row is None:
            return Problem("unclosed quote", f"{where}: a quote is not closed, or a field is too long")
        if len(row) != len(self.header):
            return Problem(FIELDS, f"{where}: {len(row)} field(s), but the header line has {len(self.header)}")
        for name, kind in zip(self.names, self.kinds, strict=True):
            found = kind.problem(row[self.header.index(name)])
            if found is not None:
                return Problem(found[0], f"{where}: column {name!r}: {found[1]}")
        return None

    def _split(self, lines: list[str]) -> Iterator[tuple[int, list[str] | None]]:
        """(line from 0, its fields) of every row that is not empty; None for one that does not end."""
        rows = csv.reader([*lines, self._end], delimiter=self.delimiter)
        last = 0
        while last < len(lines):
            first, last, row = last, *_next_row(rows)
            if row is not None and (last - first == 1 or (len(row) == len(self.header) and last <= len(lines))):
                if row:
                    yield first, row
                continue
            # A quote that is not closed has swallowed the lines after it.
            for line in range(first, min(last, len(lines))):
                used, alone = _next_row(csv.reader([lines[line], self._end], delimiter=self.delimiter))
                if alone != []:
                    yield line, alone if used == 1 else None

    def _first_of(self, name: str) -> str:
        """The first value in a column, of rows that have one; empty where none has, or the column is not there."""
        if name not in self.header:
            return ""
        place = self.header.index(name)
        for _, data in self._blocks():
            for _, row in self._split(list(io.StringIO(data.decode("utf-8", "replace"), newline=""))):
                if row is not None and len(row) == len(self.header) and row[place]:
                    return row[place]
        return ""

    @property
    def _end(self) -> str:
        """A row to come after the others: it is not seen where a quote is still open."""
        return self.delimiter.join([END] * len(self.header)) + "\n"


def _next_row(rows: Any) -> tuple[int, list[str] | None]:
    """(lines read so far, the fields of the next row); no fields where the csv module gives up, as for very long ones."""
    try:
        row = next(rows)
    except csv.Error:
        row = None
    return rows.line_num, row


def _whole_lines(data: bytes) -> int:
    """How many bytes of `data` are whole lines, 0 if there is none. The lines of a quoted value stay together if possible."""
    end = len(data)
    last = 0
    for _ in range(CUTS_TRIED):
        end = data.rfind(b"\n", 0, end) + 1 or data.rfind(b"\r", 0, min(end, len(data) - 1)) + 1
        last = last or end
        if not end or data.count(b'"', 0, end) % 2 == 0:
            return end or last
        end -= 1
    return last


def _line_count(data: bytes) -> int:
    """Ends of lines, of each of the three kinds, and a last line without one."""
    ends = data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")
    return ends + (bool(data) and not data.endswith((b"\n", b"\r")))
