"""Clicks from files that are named or matched by patterns: text, also compressed, and Parquet, told apart by the suffix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from shardembed.config.optional import missing
from shardembed.errors import DataError
from shardembed.recipes.data.clicks.rows import Clicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.opening import matched, named

try:
    from shardembed.recipes.data.criteo.columns import ClickColumns
    from shardembed.recipes.data.criteo.text import ClickText
except ImportError as error:
    raise DataError(missing("pyarrow", "train", "reading data files", error)) from error

PARQUET_SUFFIXES = (".parquet", ".pq")


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
        self._skip = skip
        self._patterns = list(patterns)
        self.files = [_file(path, schema) for path in matched(patterns, setting)]
        for file in self.files:
            file.check()

    @property
    def name(self) -> str:
        return named(self._patterns, len(self.files))

    @property
    def parts(self) -> list[str]:
        return [str(file.path) for file in self.files]

    def chunks(self, part: int) -> Iterator[Clicks]:
        return self.files[part].chunks(self._skip)


def _file(path: Path, schema: Schema) -> ClickColumns | ClickText:
    return (ClickColumns if path.suffix.lower() in PARQUET_SUFFIXES else ClickText)(path, schema)
