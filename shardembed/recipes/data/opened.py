"""Files that are opened: the columns that are wanted of them, whatever they are and wherever they are, row after row.

Each source of a training job, of clicks or of interactions, is one of these with names for its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from shardembed.config.hints import nearest
from shardembed.config.optional import missing
from shardembed.errors import DataError
from shardembed.recipes.data.bad import Dropped
from shardembed.recipes.data.layout import LAYOUTS, Layout
from shardembed.recipes.data.lists import Lists, Values, has
from shardembed.recipes.data.opening import (
    PACKED_SUFFIXES,
    PARQUET_SUFFIXES,
    TEXT_SUFFIXES,
    UNREADABLE,
    Place,
    matched,
    named,
)
from shardembed.recipes.data.wanted import ANY_IDS, Read, Wanted

try:
    from shardembed.recipes.data.as_is import AsIs, repeated
    from shardembed.recipes.data.deciding import kind_of_ids, kinds_of
    from shardembed.recipes.data.kinds import Kind
    from shardembed.recipes.data.parquet_file import ParquetFile
    from shardembed.recipes.data.text import Parsed, TextFile
except ImportError as error:
    raise DataError(missing("pyarrow", "train", "reading data files", error)) from error


@dataclass(frozen=True)
class Files:
    """The rows of several files, file after file; each file is a part.

    Attributes:
        name: for messages.
        files: the files.
        wanted: what is read of them.
        kinds: what the columns hold that are wanted.
        skip: bad rows are left out.
        remedy: behind what is wrong with a bad row, how to leave such out.
    """

    name: str
    files: tuple[ParquetFile | TextFile, ...]
    wanted: tuple[Wanted, ...]
    kinds: tuple[Kind, ...]
    skip: bool
    remedy: str = ""

    @property
    def parts(self) -> list[str]:
        """The paths, for messages."""
        return [str(file.place) for file in self.files]

    @property
    def header(self) -> tuple[str, ...]:
        """The names of the columns of the first file, with those that its folders give."""
        return _columns_of(self.files[0])

    @property
    def texts(self) -> dict[str, bool]:
        """Of the columns of ids, whether these are texts. The text 42 is another id than the number 42."""
        return {one.name: kind.text for one, kind in zip(self.wanted, self.kinds, strict=True) if one.kind in ANY_IDS}

    def chunks(self, part: int) -> Iterator[Read]:
        """All rows of a part.

        Raises:
            DataError: it cannot be read, or, but with `skip`, a row is bad; names file, line or row, and column.
        """
        for _, values, problems in self._rows(part):
            if problems and not self.skip:
                raise DataError(problems[0].text + self.remedy)
            yield Read(tuple(values), Dropped.of(problems))

    def read_alike(self, other: Files) -> Files:
        """Other files, with ids as texts in the columns in which these have texts, though digits were all that was seen there.

        Raises:
            DataError: they have texts in a column in which these have whole numbers.
        """
        kinds = []
        for one, kind in zip(other.wanted, other.kinds, strict=True):
            texts = self.texts.get(one.name, kind.text)
            if kind.text and not texts:
                raise DataError(
                    f"{one.setting}: {other.name} has texts in {one.name!r}, but {self.name} has whole numbers, and the text 42 is "
                    f"another id than the number 42; write both alike, or say data.texts: [{one.name}]"
                )
            kinds.append(kind if texts == kind.text or one.name not in other.texts else kind_of_ids(one, texts))
        return replace(other, kinds=tuple(kinds))

    def place(self, column: int, value: int) -> str:
        """Where the first row is that has `value` in a column of `wanted`, or where the data are. Reads the files."""
        places = (place for part in range(len(self.files)) for place in self._places(part, column, value))
        return next(places, self.name)

    def _rows(self, part: int) -> Iterator[Parsed]:
        file = self.files[part]
        inside = [place for place, one in enumerate(self.wanted) if one.name in file.header]
        given = {place: self._partition(file, place) for place in range(len(self.wanted)) if place not in inside}
        columns = [(self.wanted[place].name, self.kinds[place]) for place in inside]
        rows = file.rows(columns) if isinstance(file, TextFile) else file.rows(columns, [self.wanted[place] for place in inside])
        for count, values, problems in rows:
            found = dict(zip(inside, values, strict=True))
            yield count, [found[p] if p in found else _repeated(given[p], count) for p in range(len(self.wanted))], problems

    def _places(self, part: int, column: int, value: int) -> Iterator[str]:
        file, name = self.files[part], self.wanted[column].name
        if name not in file.header:
            if has(self._partition(file, column), value).any():
                yield f"{file.place}: column {name!r}"
            return
        inside = [(one.name, kind) for one, kind in zip(self.wanted, self.kinds, strict=True) if one.name in file.header]
        yield from file.places(inside, [one for one, _ in inside].index(name), value)

    def _partition(self, file: ParquetFile | TextFile, place: int) -> Values:
        """The one value that a file's folders give to a column.

        Raises:
            DataError: it is of no use.
        """
        wanted, kind = self.wanted[place], self.kinds[place]
        value = file.place.partitions.get(wanted.name) or ""
        if (found := kind.problem(value)) is not None:
            raise DataError(f"{file.place}: column {wanted.name!r}, of the folder's name: {found[1]}")
        return kind.slow([value])


def open_files(paths: Sequence[str], wanted: Sequence[Wanted], skip: bool, setting: str, layout: Layout | None = None) -> Files:
    """Look at the files that paths, folders and patterns name, and at the first rows of some.

    Args:
        wanted: the columns that are read; the chunks have them in this order.
        skip: leave out bad rows, and say which in the chunks.
        setting: where the paths came from, for messages.
        layout: of text files without a header line; None where the suffix tells it.

    Raises:
        DataError: a file or a column is missing, or of a kind that is of no use; a column is wanted twice.
    """
    for one, other in combinations(wanted, 2):
        if one.name == other.name:
            raise DataError(f"{paths[0]}: {one.setting} and {other.setting} both name the column {one.name!r}")
    files = open_all(paths, setting, layout)
    for file in files:
        for one in wanted:
            _check_column(file, one, wanted)
    said = "data.on_bad_row: skip" if setting.startswith("data.") else "--on-bad-row skip" if setting == "--data" else ""
    remedy = f" (or leave out such rows, by {said})" if said else ""
    return Files(named(list(paths), len(files)), files, tuple(wanted), kinds_of(wanted, files), skip, remedy)


def open_all(paths: Sequence[str], setting: str, layout: Layout | None = None) -> tuple[ParquetFile | TextFile, ...]:
    """The files, whatever columns they have.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    known = (*TEXT_SUFFIXES, *PARQUET_SUFFIXES)
    places = matched(paths, setting, (lambda suffix: suffix in known) if layout is None else lambda suffix: True)
    return tuple(_open(place, layout) for place in places)


def _open(place: Place, layout: Layout | None) -> ParquetFile | TextFile:
    if place.suffix in PARQUET_SUFFIXES:
        return ParquetFile.open(place)
    layout = layout or LAYOUTS.get(place.suffix)
    if layout is None:
        known = ", ".join((*TEXT_SUFFIXES, *(f"{text}{packed}" for text in TEXT_SUFFIXES for packed in PACKED_SUFFIXES)))
        raise DataError(
            f"{place}: the suffix {place.suffix!r} tells no known format; use one of {known}, {', '.join(PARQUET_SUFFIXES)}"
        )
    try:
        return TextFile.open(place, layout)
    except UNREADABLE as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{place}: cannot read the file: {said}; is the file whole?") from error


def _columns_of(file: ParquetFile | TextFile) -> tuple[str, ...]:
    return (*file.header, *(name for name in file.place.partitions if name not in file.header))


def _check_column(file: ParquetFile | TextFile, wanted: Wanted, all_wanted: Sequence[Wanted]) -> None:
    names = _columns_of(file)
    if wanted.name not in names:
        # A column with a part of its own is not meant.
        near = nearest(wanted.name, [name for name in names if name not in {one.name for one in all_wanted}]) or "."
        listed = (", ".join(names) or "(none)") + file.hint
        raise DataError(f"{file.place}: there is no column {wanted.name!r} ({wanted.setting}){near} The columns are: {listed}")
    if (count := file.header.count(wanted.name)) > 1:
        raise DataError(f"{file.place}: there are {count} columns {wanted.name!r} ({wanted.setting}); rename the others")
    if isinstance(file, ParquetFile) and count:
        file.check(wanted)
    elif wanted.kind == "ids" and wanted.separator is None:
        raise DataError(
            f"{file.place}: column {wanted.name!r} ({wanted.setting}) is text: say what stands between two ids by `separator`"
        )


def _repeated(values: Values, count: int) -> Values:
    if isinstance(values, AsIs):
        return repeated(values, count)  # type: ignore[return-value]
    if isinstance(values, Lists):
        return Lists(np.tile(values.values, count), np.repeat(values.lengths, count))
    return np.repeat(values, count, axis=-1)
