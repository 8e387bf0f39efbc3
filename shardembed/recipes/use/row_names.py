"""What rows of a run's tables stand for, as its folder says: for commands that show rows, and are asked for them by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shardembed.config.scalars import int64_of
from shardembed.errors import ConfigError
from shardembed.inputs.vocab import Vocabulary
from shardembed.recipes.data.clicks.encode import vocabulary_file
from shardembed.recipes.run_folder import VOCABULARIES, run_of
from shardembed.recipes.use.catalog import NO_ID, Catalog, kept_names

PREFIX = "tables."  # of a table's name in a checkpoint


@dataclass(frozen=True)
class RowNames:
    """Of a table whose rows are ids, or of one whose rows are numbers of a vocabulary's values.

    Attributes:
        names: the texts of ids.
        vocabulary: None where rows are ids.
        table: its name, for messages.
    """

    names: Catalog
    vocabulary: Vocabulary | None
    table: str

    @staticmethod
    def of(folder: Path, table: str) -> RowNames | None:
        """folder: of the run, or of one of its checkpoints. None where nothing is known but numbers."""
        run = run_of(folder)
        if run is None:
            return None
        name = table.removeprefix(PREFIX)
        texts, vocabulary = kept_names(run, name), vocabulary_file(run / VOCABULARIES, name)
        if texts is None and not vocabulary.is_file():
            return None
        found = Vocabulary.load(vocabulary) if vocabulary.is_file() else None
        return RowNames(Catalog(name, np.empty(0, np.int64), texts), found, name)

    def rows_of(self, words: Sequence[str], known: np.ndarray | None) -> list[int]:
        """The rows that are named; a word that names none may be a row's number.

        known: the ids that have a row; None: rows are numbered.

        Raises:
            ConfigError: a word is neither.
        """
        return [self._row_of(word, known) for word in words]

    def _row_of(self, word: str, known: np.ndarray | None) -> int:
        value = int(self.names.ids_of([word])[0])
        if self.vocabulary is not None:
            row = int(self.vocabulary([word] if self.vocabulary.kind == "texts" else np.array([value]))[0])
            if row:
                return row
        elif value != NO_ID and (known is None or value in known):
            return value
        number = int64_of(word)
        if number is None:
            raise ConfigError(f"--id {word}: nothing of that name has a row in table {self.table!r}")
        return number

    def of_rows(self, rows: Sequence[int]) -> dict[int, str]:
        """The name of each row; of one without, its number."""
        if self.vocabulary is None:
            return dict(zip(rows, map(str, self.names.names_of(np.array(rows, np.int64)).to_pylist()), strict=True))
        values = {row: self.vocabulary.values[row - 1] for row in rows if 0 < row <= len(self.vocabulary.values)}
        if self.names.names is None or self.vocabulary.kind == "texts":
            found = {row: str(value) for row, value in values.items()}
        else:
            texts = self.names.names_of(np.array(list(values.values()), np.int64)).to_pylist()
            found = dict(zip(values, texts, strict=True))
        return {row: found.get(row, "(other values)" if row == 0 else str(row)) for row in rows}
