"""Some columns of a text file, plain or compressed, in blocks of whole lines: parsed by pyarrow where all is well, line by line
where it is not.

A block that pyarrow finds anything wrong with is cut into pieces, and only the pieces that are still bad are read slowly. That
gives the number of every bad line without reading the file twice, and keeps an unclosed quote from swallowing the lines after it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import csv as arrow_csv

from shardembed.errors import DataError
from shardembed.recipes.data.bad import FIELDS, Problem, short
from shardembed.recipes.data.kinds import Kind
from shardembed.recipes.data.layout import Layout
from shardembed.recipes.data.lines import after_lines, cut, line_count, lines_of, whole_lines
from shardembed.recipes.data.lists import Values, has
from shardembed.recipes.data.opening import UNREADABLE, Place, open_text

BLOCK_BYTES = 4 << 20  # of text parsed at a time
PIECE_BYTES = 16 << 10  # that are read line by line where something is wrong
PIECES = 16  # into which a block with something wrong is cut, and cut again
THREAD_BYTES = 1 << 19  # that one of pyarrow's threads takes
SAMPLE_BYTES = 1 << 20  # whose values say what a column holds
MAX_LINE = 16 << 20
END = "end"
BOM = b"\xef\xbb\xbf"
TAR = slice(257, 262)  # where "ustar" stands in an archive
SIGNS = {";": "semicolons", "\t": "tabs", ",": "commas", "|": "bars", " ": "blanks"}
Columns = Sequence[tuple[str, Kind]]  # what is read: names, and what they hold
Parsed = tuple[int, list[Values], list[Problem]]  # how many good rows, the values of each column, and what is wrong with the others


@dataclass(frozen=True)
class TextFile:
    """A file of delimited text.

    Attributes:
        place: of the file.
        layout: of its rows.
        header: the names of all columns.
        header_lines: how many lines the header takes.
    """

    place: Place
    layout: Layout
    header: tuple[str, ...]
    header_lines: int

    @staticmethod
    def open(place: Place, layout: Layout) -> TextFile:
        """Read the header, or where there is none look at the first row.

        Raises:
            DataError, or any of opening.UNREADABLE: the file or its first line cannot be read.
        """
        if layout.names:
            _check_first(place, layout)
            return TextFile(place, layout, layout.names, 0)
        with open_text(place) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file, delimiter=layout.delimiter)
            try:
                header = next(rows, [])
            except csv.Error as error:
                raise DataError(f"{place}:1: the header cannot be read: {error}; is this a text file?") from error
            lines = rows.line_num
            if any("\0" in name for name in header):
                raise DataError(f"{place}:1: there are NUL bytes in the header; if this is UTF-16, convert it to UTF-8")
            if not any(name.strip() for name in header):
                what = "the first line is empty" if lines else "the file is empty"
                raise DataError(f"{place}:1: {what}; the first line of a text file must have the names of its columns")
        return TextFile(place, layout, tuple(header), lines)

    @property
    def hint(self) -> str:
        """Behind the names of the columns, where another sign seems to stand between them."""
        for sign, name in SIGNS.items():
            if len(self.header) == 1 and sign in self.header[0]:
                return (
                    f"; this header has {name} in it, but between two fields must be a comma in a .csv file, and a tab in a .tsv "
                    "file: replace them, or name the file by what it holds, or write the data as Parquet"
                )
        return ""

    def rows(self, columns: Columns) -> Iterator[Parsed]:
        """Block by block."""
        for first_line, data in self._blocks(BLOCK_BYTES):
            yield from self._parsed(data, first_line, columns)

    def sample(self, names: Sequence[str], until_all: bool = True) -> dict[str, pa.Array]:
        """The texts in some columns of the first rows. until_all: further on until each column has one that is not empty."""
        columns = [(name, RAW) for name in names]
        found: dict[str, list[pa.Array]] = {name: [] for name in names}
        seen = 0
        empty = set(names)
        for first_line, data in self._blocks(SAMPLE_BYTES):
            for _, values, _ in self._parsed(data, first_line, columns):
                texts: Any
                for name, texts in zip(names, values, strict=True):
                    found[name].append(texts)
                    if name in empty and any(texts.view(pa.binary()).to_pylist()):
                        empty.discard(name)
            seen += len(data)
            if seen >= SAMPLE_BYTES and not (until_all and empty):
                break
        return {name: pa.concat_arrays(texts) if texts else pa.array([], pa.string()) for name, texts in found.items()}

    def places(self, columns: Columns, column: int, value: int) -> Iterator[str]:
        """Where good rows are that have `value` in one of `columns`."""
        name, kind = columns[column]
        place = self.header.index(name)
        for first_line, data in self._blocks(BLOCK_BYTES):
            if not any(has(values[column], value).any() for _, values, _ in self._parsed(data, first_line, columns)):
                continue
            for line, row in self._split(lines_of(data)):
                if row is not None and self._judge(row, "", columns) is None and has(kind.slow([row[place]]), value).any():
                    yield f"{self.place}:{first_line + line}: column {name!r}"

    def _blocks(self, size: int) -> Iterator[tuple[int, bytes]]:
        """(number of the first line, whole lines), the header left out.

        Raises:
            DataError: the file cannot be read on, or has a line without an end.
        """
        line, rest, skip = 1, b"", self.header_lines
        try:
            with open_text(self.place) as file:
                ended = False
                while not ended:
                    read = file.read(size)
                    ended = not read
                    block, rest = cut(rest, read)
                    if not block and len(rest) > MAX_LINE:
                        raise DataError(
                            f"{self.place}:{line}: a line of more than {MAX_LINE} bytes is not read; is this a text file?"
                        )
                    if line == 1:
                        block = block.removeprefix(BOM)
                    lines = line_count(block)
                    if skip:
                        taken = min(skip, lines)
                        block = after_lines(block, taken)
                        skip, line, lines = skip - taken, line + taken, lines - taken
                    if block:
                        yield line, block
                    line += lines
        except UNREADABLE as error:
            said = getattr(error, "strerror", None) or error
            raise DataError(f"{self.place}: cannot read on at line {line}: {said}; is the file whole?") from error

    def _parsed(self, data: bytes, first_line: int, columns: Columns) -> Iterator[Parsed]:
        found = self._fast(data, columns)
        if found is not None:
            yield found[0], found[1], []
        elif len(data) <= PIECE_BYTES:
            yield self._slow(data, first_line, columns)
        else:
            size = max(PIECE_BYTES, len(data) // PIECES)
            while data:
                whole = whole_lines(data[:size]) or len(data)  # a line longer than a piece comes with all that follows it
                if whole == len(data) > size:
                    yield self._slow(data, first_line, columns)
                else:
                    yield from self._parsed(data[:whole], first_line, columns)
                first_line += line_count(data[:whole])
                data = data[whole:]

    def _fast(self, data: bytes, columns: Columns) -> tuple[int, list[Values]] | None:
        """How many rows there are and their values when every one is good, else None."""
        if b"\0" in data:
            return None
        places = [str(self.header.index(name)) for name, _ in columns]
        quotes = not self.layout.names and b'"' in data
        texts = self._read(data + self._closing(data) if quotes else data, places, quotes)
        if texts is None:
            return None
        count = len(texts[0]) - quotes
        if quotes and texts[0].view(pa.binary())[count].as_py() != END.encode():
            return None
        found = []
        for column, (_, kind) in zip(texts, columns, strict=True):
            values = kind.fast(column[:count])
            if values is None:
                return None
            found.append(values)
        return count, found

    def _closing(self, data: bytes) -> bytes:
        """Behind a block with quotes: a row of its own, which is not seen where a quote is still open."""
        return b"\n" * (not data.endswith((b"\n", b"\r"))) + self._end.encode()

    def _read(self, data: bytes, places: list[str], quotes: bool) -> list[pa.Array] | None:
        """The texts in some columns, by their places, as pyarrow parses them; None where any row has other columns than the header.

        Columns go by position: names may repeat. Numbers are read as text, so that a bad value can be told from a bad file.
        """
        wrong: list[object] = []

        def note(row: object) -> str:
            wrong.append(row)
            return "skip"

        # A quoted line break between two threads is not always an error: "a\nb,c" is a row of two fields on either side of it.
        threads = len(data) > 2 * THREAD_BYTES
        read = arrow_csv.ReadOptions(use_threads=threads, block_size=THREAD_BYTES if threads else len(data) + 1)
        read.column_names = [str(place) for place in range(len(self.header))]
        parse = arrow_csv.ParseOptions(
            delimiter=self.layout.delimiter,
            quote_char='"' if quotes else False,
            newlines_in_values=quotes,
            invalid_row_handler=note,
        )
        convert = arrow_csv.ConvertOptions(check_utf8=False, strings_can_be_null=False)
        convert.include_columns, convert.column_types = places, dict.fromkeys(places, pa.string())
        try:
            table = arrow_csv.read_csv(pa.BufferReader(data), read, parse, convert)
        except pa.ArrowInvalid:
            return None
        return None if wrong else [_in_one(table.column(place)) for place in places]

    def _slow(self, data: bytes, first_line: int, columns: Columns) -> Parsed:
        good: list[list[str]] = []
        problems: list[Problem] = []
        for line, row in self._split(lines_of(data)):
            problem = self._judge(row, f"{self.place}:{first_line + line}", columns)
            if problem is not None:
                problems.append(problem)
            elif row is not None:
                good.append(row)
        places = [self.header.index(name) for name, _ in columns]
        values = [kind.slow([row[place] for row in good]) for place, (_, kind) in zip(places, columns, strict=True)]
        return len(good), values, problems

    def _judge(self, row: list[str] | None, where: str, columns: Columns) -> Problem | None:
        if row is None:
            return Problem("unclosed quote", f"{where}: a quote is not closed, or a field is too long")
        if len(row) != len(self.header):
            return Problem(FIELDS, f"{where}: {len(row)} field(s), but {self._fields}{_delimited_by(row, self.layout)}")
        for name, kind in columns:
            place = self.header.index(name)
            found = kind.problem(row[place]) if "\0" not in row[place] else ("NUL byte", "there is a NUL byte in it")
            if found is not None:
                field = f" (field {place + 1})" if self.layout.names else ""
                return Problem(found[0], f"{where}: column {name!r}{field}: {found[1]}")
        return None

    @property
    def _fields(self) -> str:
        return f"a row has {self.layout.described}" if self.layout.names else f"the header line has {len(self.header)}"

    def _split(self, lines: list[str]) -> Iterator[tuple[int, list[str] | None]]:
        """(line from 0, its fields) of every row that is not empty; None for one that does not end."""
        if self.layout.names:
            rows = ((number, line.rstrip("\r\n")) for number, line in enumerate(lines))
            yield from ((number, line.split(self.layout.delimiter)) for number, line in rows if line)
            return
        with _long_fields():
            yield from self._quoted(lines)

    def _quoted(self, lines: list[str]) -> Iterator[tuple[int, list[str] | None]]:
        rows = csv.reader([*lines, self._end], delimiter=self.layout.delimiter)
        last = 0
        while last < len(lines):
            first, last, row = last, *_next_row(rows)
            if row is not None and (last - first == 1 or (len(row) == len(self.header) and last <= len(lines))):
                if row:
                    yield first, row
                continue
            # A quote that is not closed has swallowed the lines after it.
            for line in range(first, min(last, len(lines))):
                used, alone = _next_row(csv.reader([lines[line], self._end], delimiter=self.layout.delimiter))
                if alone != []:
                    yield line, alone if used == 1 else None

    @property
    def _end(self) -> str:
        """A row to come after the others: it is not seen where a quote is still open."""
        return self.layout.delimiter.join([END] * len(self.header)) + "\n"


RAW = Kind(lambda column: column, lambda column: column, lambda value: None, lambda values: pa.array(values, pa.string()))  # type: ignore[arg-type,return-value]


def _check_first(place: Place, layout: Layout) -> None:
    """
    Raises:
        DataError: a file without header cannot be read, or its first line is no row.
    """
    try:
        with open_text(place) as file:
            line = file.readline(MAX_LINE + 1)
    except UNREADABLE as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{place}: cannot read on at line 1: {said}; is the file whole?") from error
    if line[TAR] == b"ustar":
        raise DataError(f"{place}: is a tar archive; unpack it and name the files in it")
    line = line.removeprefix(BOM)
    if not line.strip():
        return
    fields = line.rstrip(b"\r\n").decode("utf-8", "replace").split(layout.delimiter)
    if len(fields) != len(layout.names):
        hint = _delimited_by(fields, layout)
        raise DataError(f"{place}:1: {len(fields)} field(s), but a row has {layout.described}{hint}")
    if re.match("[A-Za-z_]", fields[0]):
        name = layout.names[0]
        raise DataError(
            f"{place}:1: column {name!r} (field 1): {short(repr(fields[0]))} is no {name}; files of this layout have no header line"
        )


def _delimited_by(fields: Sequence[str], layout: Layout) -> str:
    """A hint where another sign seems to stand between the fields of a row without header."""
    for sign, name in SIGNS.items():
        if layout.names and len(fields) == 1 and fields[0].count(sign) == len(layout.names) - 1:
            return f"; this one has {name} there: replace them, or write the data as Parquet"
    return ""


def _in_one(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)


@contextmanager
def _long_fields() -> Iterator[None]:
    """While the csv module takes what pyarrow takes."""
    before = csv.field_size_limit(MAX_LINE)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _next_row(rows: Any) -> tuple[int, list[str] | None]:
    """(lines read so far, the fields of the next row); no fields where the csv module gives up, as for very long ones."""
    try:
        row = next(rows)
    except csv.Error:
        row = None
    return rows.line_num, row
