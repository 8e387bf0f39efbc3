"""Clicks from files that are named or matched by patterns: text of the Criteo layout, and Parquet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from shardembed.recipes.data.criteo.rows import Clicks, Schema
from shardembed.recipes.data.layout import Layout
from shardembed.recipes.data.opened import Files, open_files
from shardembed.recipes.data.wanted import Read, Wanted


class ClickFiles:
    """The rows of several files, file after file; each file is a part.

    Args:
        patterns: paths or patterns; what one pattern matches is read in the order of the names.
        setting: where the patterns came from, for messages.
        skip: leave out bad rows, and say which in the chunks.

    Raises:
        DataError: on construction, where a file or a column is missing; while reading, for a bad row.
    """

    def __init__(self, patterns: Sequence[str], schema: Schema, skip: bool, setting: str = "data.path") -> None:
        layout = Layout("\t", schema.names, f"{schema}, with a tab between two", texts=schema.any_id)
        category = "id" if schema.any_id else "hex"
        wanted = [
            Wanted(schema.label, "label", "data.label"),
            *(Wanted(name, "number", "data.integers") for name in schema.integers),
            *(Wanted(name, category, "data.categories", names=schema.books.get(name)) for name in schema.categories),
        ]
        self._numbers = 1 + len(schema.integers)
        self._files: Files = open_files(list(patterns), wanted, skip, setting, layout)

    @property
    def name(self) -> str:
        return self._files.name

    @property
    def parts(self) -> Sequence[str]:
        return self._files.parts

    def chunks(self, part: int) -> Iterator[Clicks]:
        return map(self._clicks, self._files.chunks(part))

    def _clicks(self, read: Read) -> Clicks:
        labels, numbers, categories = read.columns[0], read.columns[1 : self._numbers], read.columns[self._numbers :]
        assert isinstance(labels, np.ndarray)
        count = len(labels)
        return Clicks(labels, _stacked(numbers, count, np.float32), _stacked(categories, count, np.int64), read.dropped)


def _stacked(columns: Sequence[object], count: int, dtype: type) -> np.ndarray:
    """`[n, columns]`, each row in one piece."""
    found = np.empty((count, len(columns)), dtype)
    for place, column in enumerate(columns):
        found[:, place] = column
    return found
