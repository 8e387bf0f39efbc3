"""Users or items as their people call them, and the numbers by which a model knows them.

names  ->  ids      what a table's rows are called: integers as they are, texts by `se.hash64`
ids    ->  numbers  0, 1, ..., of those that have a row; `NOBODY` of others
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.config.arrow_types import is_number, plain, whole_numbers
from shardembed.errors import DataError
from shardembed.inputs.hash64 import hash64
from shardembed.inputs.names import columns_in
from shardembed.recipes.data.any_ids import MOST
from shardembed.recipes.data.bad import MAX_USER, MIN_USER
from shardembed.recipes.data.naming import folder_of, had_texts
from shardembed.recipes.data.numbering import Numbers
from shardembed.recipes.run_folder import NAMES

DIGITS = r"^-?[0-9]{1,40}(\.0*)?$"
NO_ID = np.iinfo(np.int64).min  # of what is no name here; no id of ours, which are hashes or counts


@dataclass(frozen=True)
class Catalog:
    """The users or the items of a run.

    Attributes:
        what: "user" or "item".
        ids: of each number the id, int64 `[n]`, ascending.
        names: the folder of the names of ids that are texts; None where ids are integers, and their own names.
    """

    what: str
    ids: np.ndarray
    names: Path | None

    def __len__(self) -> int:
        return len(self.ids)

    def ids_of(self, values: Any) -> np.ndarray:
        """Names as ids, int64 `[m]`; `NO_ID` of what can be none.

        Args:
            values: what Arrow makes an array of: a list, a column of a table.

        Raises:
            DataError: they are neither texts nor numbers, or one is missing.
        """
        column = _column(values, self.what)
        if self.names is not None:
            texts = column if pa.types.is_string(column.type) else compute.cast(whole_numbers(column), pa.string())
            return hash64(texts)
        if pa.types.is_string(column.type):
            usable = compute.call_function("match_substring_regex", [column], compute.MatchSubstringOptions(DIGITS))
            digits = compute.call_function("replace_substring_regex", [column], compute.ReplaceSubstringOptions(r"\.0*$", ""))
            return _int64s(compute.call_function("if_else", [usable, digits, pa.scalar(None, pa.string())]))
        numbers = whole_numbers(column)
        assert numbers is not None, "else `_column` refuses them"
        return numbers.to_numpy(zero_copy_only=False).astype(np.int64)

    def numbers_of(self, ids: np.ndarray) -> np.ndarray:
        """Of ids, int64 in their shape; `NOBODY` of those without a row."""
        return self._numbers(ids)

    def named(self, numbers: np.ndarray) -> pa.Array:
        """The names of numbers `[m]`, none of them `NOBODY`: texts, or int64."""
        return self.names_of(self.ids[numbers])

    def names_of(self, ids: np.ndarray) -> pa.Array:
        """The names of ids `[m]`. Of a text that nobody noted, the digits of its id."""
        if self.names is None:
            return pa.array(ids, pa.int64())
        known, texts = self._book
        if not len(known):
            return pa.array(map(str, ids.tolist()), pa.string())
        places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        there = known[places] == ids
        found = texts.take(pa.array(places))
        if not there.all():
            found = compute.call_function("if_else", [pa.array(there), found, pa.array(map(str, ids.tolist()), pa.large_string())])
        return found.cast(pa.string())

    @cached_property
    def _numbers(self) -> Numbers:
        return Numbers(self.ids)

    @cached_property
    def _book(self) -> tuple[np.ndarray, pa.Array]:
        assert self.names is not None
        return columns_in(self.names)


def _int64s(digits: pa.Array) -> np.ndarray:
    """Texts of digits, or nulls, as the 64 bits of the numbers, with a sign or without, as the data are read; `NO_ID` of others."""
    try:
        return compute.fill_null(compute.cast(digits, pa.int64()), NO_ID).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:  # one is beyond
        return np.array([NO_ID if one is None else _wrapped(int(one)) for one in digits.to_pylist()], np.int64)


def _wrapped(number: int) -> int:
    if not MIN_USER <= number <= MOST:
        return NO_ID
    return number - (1 << 64) if number > MAX_USER else number


def kept_names(run: Path, table: str) -> Path | None:
    """The folder of the names of a table's ids, which are texts then; None where they are integers."""
    return folder_of(run / NAMES, table) if had_texts(run / NAMES, table) else None


def array_of(values: Any, what: str) -> pa.Array:
    """Names that somebody gave, as an array of Arrow `[m]`.

    Raises:
        DataError: they are no list and no column. A text is none: its letters are nobody's names.
    """
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values
    if isinstance(values, str | bytes):
        raise DataError(f"{what}s must be a list or a column, and not the text {values!r:.60}; of one, say [{values!r:.60}]")
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError) as error:
        raise DataError(f"{what}s must be a list or a column of texts or of whole numbers: {error}") from None


def _column(values: Any, what: str) -> pa.Array:
    """
    Raises:
        DataError: it holds neither texts nor whole numbers, or one is missing.
    """
    column = plain(array_of(values, what))
    if pa.types.is_null(column.type) and not len(column):
        return pa.array([], pa.string())
    if column.null_count:
        place = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(f"{what} {place} (from 0) is missing; remove it, or fill it in")
    if pa.types.is_string(column.type):
        return column
    if not is_number(column.type) or whole_numbers(column) is None:
        raise DataError(f"{what}s must be texts or whole numbers of 64 bits, not {column.type}")
    return column
