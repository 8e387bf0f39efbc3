"""Interactions from files: a user, an item and maybe a time of every row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from shardembed.inputs.names import Names
from shardembed.recipes.data.lists import Lists
from shardembed.recipes.data.opened import Files, open_files
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.data.wanted import NO_BOOKS, Wanted, WantedKind, wanted_of
from shardembed.recipes.features_config import FeatureConfig


class FileInteractions:
    """The interactions of one or more files, file after file.

    Args:
        paths: what names them.
        time: the column of times, whole numbers, or dates with or without a time of day; None where times are of no interest.
        features: columns that are read too.
        any_user: users may be any integers of 64 bits with a sign, for they have no rows in a table.
        any_id: users and items may be any integers of 64 bits, or texts.
        texts: columns that are read as texts though they hold digits.
        books: of "user", "item" and features, where texts are to be noted with their ids.
        on_bad_row: "raise", or "skip" to leave out rows that hold no two ids; the chunks say which ones were.

    Raises:
        DataError: on construction, where a file or a column is missing; while reading, for a value that is no id, with its line.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str],
        user: str,
        item: str,
        on_bad_row: Literal["raise", "skip"] = "raise",
        time: str | None = None,
        features: Sequence[FeatureConfig] = (),
        any_user: bool = False,
        any_id: bool = False,
        texts: Sequence[str] = (),
        books: Mapping[str, Names] = NO_BOOKS,
    ) -> None:
        kinds: tuple[WantedKind, WantedKind] = ("key", "key") if any_id else ("user" if any_user else "row", "row")
        wanted = [
            Wanted(name, kind, f"data.{table}", text=any_id and name in texts, names=books.get(table))
            for name, kind, table in zip((user, item), kinds, ("user", "item"), strict=True)
        ]
        wanted += [Wanted(time, "time", "data.time")] if time is not None else []
        self._features = len(features)
        wanted += wanted_of(features, texts, books)
        patterns = [str(paths)] if isinstance(paths, str | Path) else list(paths)
        self.files: Files = open_files(patterns, wanted, on_bad_row == "skip", "data.path")

    @property
    def name(self) -> str:
        return self.files.name

    @property
    def parts(self) -> Sequence[str]:
        return self.files.parts

    def chunks(self, part: int = 0) -> Iterator[Chunk]:
        for read in self.files.chunks(part):
            end = len(read.columns) - self._features
            users, items, *times = (one for one in read.columns[:end] if not isinstance(one, Lists))
            moments, fine = _parted(times[0]) if times else (None, None)
            yield Chunk(users, items, read.dropped, moments, fine, read.columns[end:])

    def place(self, column: int, value: int) -> str:
        """Where the first row with that user (column 0) or item (1) is: file and line, or row. Reads the files."""
        return self.files.place(column, value)


def _parted(times: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Times, and the nanoseconds beyond where any is not 0; else a copy of times, or whoever keeps them keeps the zeros too."""
    return (times[0], times[1]) if times[1].any() else (times[0].copy(), None)
