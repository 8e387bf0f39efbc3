"""What the columns of a file hold, as far as its first rows tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from pyarrow import compute

from shardembed.config.arrow_types import is_number, plain, plain_type
from shardembed.recipes.data.any_ids import absent_as_nulls, are_texts, without
from shardembed.recipes.data.feature_kinds import LABELLED, NUMBERS, is_list, split
from shardembed.recipes.data.kinds import CLOCK_TIME, is_clock
from shardembed.recipes.data.parquet_file import ParquetFile
from shardembed.recipes.data.text import TextFile

ROWS = 50_000  # that are looked at
SEPARATORS = ("|", ";", ",")
DATED_SHARE = 0.99  # of the values that are dates, where the others are mistakes
NUMBERED_SHARE = 0.99  # likewise of numbers, if some have a fraction: others may be ids of which few are texts
DECIMALS = r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$"
SPLIT_SHARE = 0.2  # of the values that hold a separator, where it is one
EXAMPLES = 3
SHOWN = 24


@dataclass(frozen=True)
class Column:
    """What the first rows have in a column.

    Attributes:
        name: of it.
        holds: "dates", "whole numbers", "numbers", "texts", "lists", "texts of lists", "nothing", or "what is not read".
        codes: a small number for each of the values, int64 `[n]`, -1 where missing.
        distinct: how many values there are.
        is_label: all are 0 or 1, and both occur.
        separator: between the values of a text of a list.
        words: of texts, how many each of them has in the mean.
        numbers: of numbers, those that there are, float32 `[m]`.
        examples: some values, in words.
        mistakes: values that are not what it holds; those among numbers have the code -1 too.
    """

    name: str
    holds: str
    codes: np.ndarray
    distinct: int
    is_label: bool = False
    separator: str | None = None
    words: float = 0.0
    numbers: np.ndarray | None = None
    examples: str = ""
    mistakes: int = 0

    @property
    def rows(self) -> int:
        return len(self.codes)

    @property
    def missing(self) -> int:
        return int((self.codes < 0).sum()) - (self.mistakes if self.holds == "numbers" else 0)

    @property
    def is_id(self) -> bool:
        """Its values may be ids."""
        return self.holds in ("whole numbers", "texts") and self.distinct > 1


def look(file: ParquetFile | TextFile) -> list[Column]:
    """The columns of a file, those of its folders' names last.

    Raises:
        DataError: the file cannot be read.
    """
    found = _first_rows(file)
    rows = max((len(array) for array in found.values()), default=0)
    given = {name: pa.array([value or ""] * rows) for name, value in file.place.partitions.items() if name not in found}
    return [_column(name, array) for name, array in {**found, **given}.items()]


def _first_rows(file: ParquetFile | TextFile) -> dict[str, pa.Array]:
    names = [name for name in file.header if name and file.header.count(name) == 1]
    if isinstance(file, ParquetFile):
        return file.first(names, ROWS)
    return {name: texts[:ROWS] for name, texts in file.sample(names, until_all=False).items()}


def _column(name: str, array: pa.Array) -> Column:
    kind = array.type
    if is_list(kind):
        element = plain_type(kind.value_type)
        holds = "lists" if pa.types.is_integer(element) or pa.types.is_string(element) else "what is not read"
        # As texts: Arrow does not tell lists apart.
        coded = pa.array([None if one is None else str(one) for one in array.to_pylist()], pa.string()).dictionary_encode()
        codes = compute.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        examples = _shown(coded.dictionary) if holds == "lists" else str(kind)
        return Column(name, holds, codes, len(coded.dictionary), examples=examples)
    value = plain_type(kind)
    readable = is_number(value) or pa.types.is_string(value) or is_clock(value) or pa.types.is_boolean(value)
    if not readable and not pa.types.is_null(value):
        return Column(name, "what is not read", np.full(len(array), -1), 0, examples=str(kind))
    values = plain(array)
    if pa.types.is_string(values.type):
        values = _with_nulls(values)
    values, mistakes = _numbers_alone(values)
    coded = values.dictionary_encode()
    codes = compute.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    there = values.drop_null()
    holds, separator = _holds(there, coded.dictionary)
    labels = LABELLED.of(there) if len(there) and not is_clock(there.type) else None
    numbers = NUMBERS.of(there) if holds in ("whole numbers", "numbers") else None
    return Column(
        name,
        holds,
        codes,
        len(coded.dictionary),
        isinstance(labels, np.ndarray) and 0 < labels.mean() < 1,
        separator,
        _words_of(coded.dictionary) if holds == "texts" else 0.0,
        numbers if isinstance(numbers, np.ndarray) else None,
        _shown(coded.dictionary),
        _no_dates(there) if holds == "dates" and pa.types.is_string(there.type) else mistakes,
    )


def _with_nulls(texts: pa.Array) -> pa.Array:
    """Nulls in the place of empty texts, and among numbers of what stands for a missing one."""
    there = absent_as_nulls(texts).drop_null()
    if len(there) and (not are_texts(there) or NUMBERS.fast(there) is not None):
        return absent_as_nulls(texts)
    return without(texts, compute.call_function("equal", [texts.view(pa.binary()), pa.scalar(b"")]))


def _numbers_alone(values: pa.Array) -> tuple[pa.Array, int]:
    """Nulls in the place of the few values that are no numbers, where nearly all others are, and how many these are."""
    there = values.drop_null()
    if not len(there) or not pa.types.is_string(there.type) or NUMBERS.fast(there) is not None:
        return values, 0
    binary = values.view(pa.binary())
    fits = compute.call_function("match_substring_regex", [binary], compute.MatchSubstringOptions(DECIMALS))
    good = values.filter(compute.fill_null(fits, False))
    mistakes = len(there) - len(good)
    fractions = compute.call_function("match_substring", [good.view(pa.binary())], compute.MatchSubstringOptions("."))
    if mistakes > (1 - NUMBERED_SHARE) * len(there) or not (fractions.true_count and NUMBERS.fast(good) is not None):
        return values, 0
    return without(values, compute.fill_null(compute.call_function("invert", [fits]), False)), mistakes


def _words_of(distinct: pa.Array) -> float:
    texts = distinct.view(pa.binary()).to_pylist()
    return sum(len(text.split()) for text in texts) / max(len(texts), 1)


def _holds(there: pa.Array, distinct: pa.Array) -> tuple[str, str | None]:
    """What values are, of which none is missing; and what stands between those of a text."""
    if not len(there):
        return "nothing", None
    kind = there.type
    if is_clock(kind):
        return "dates", None
    if pa.types.is_boolean(kind) or pa.types.is_integer(kind):
        return "whole numbers", None
    if not pa.types.is_string(kind):
        values = there.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return "whole numbers" if (values == np.floor(values)).all() else "numbers", None
    if CLOCK_TIME.fast(there) is not None or (_is_date(there[0]) and _no_dates(there) <= (1 - DATED_SHARE) * len(there)):
        return "dates", None
    if not are_texts(there):
        return "whole numbers", None
    if NUMBERS.fast(there) is not None and not _leading_zeros(there):
        return "numbers", None
    separator = next((one for one in SEPARATORS if _separates(distinct, one)), None)
    return ("texts" if separator is None else "texts of lists"), separator


def _is_date(value: pa.Scalar) -> bool:
    return CLOCK_TIME.problem(value.as_py()) is None


def _no_dates(texts: pa.Array) -> int:
    """How many are none."""
    if CLOCK_TIME.fast(texts) is not None:
        return 0
    return sum(CLOCK_TIME.problem(one) is not None for one in texts.view(pa.binary()).to_pylist())


def _leading_zeros(texts: pa.Array) -> bool:
    options = compute.MatchSubstringOptions("^0[0-9]")
    return bool(compute.call_function("match_substring_regex", [texts], options).to_numpy(zero_copy_only=False).any())


def _separates(distinct: pa.Array, sign: str) -> bool:
    """A sign stands in many of the distinct texts; if it is one of sentences too, between parts that come again."""
    try:
        parts, counts = split(distinct, sign)
    except pa.ArrowInvalid:  # no UTF-8
        return False
    comes_again = len(parts.unique()) * 2 <= len(parts)
    return bool((counts > 1).mean() >= SPLIT_SHARE) and (comes_again or sign != ",")


def _shown(values: pa.Array) -> str:
    """The first few."""
    some = [str(one.decode("utf-8", "replace") if isinstance(one, bytes) else one) for one in _listed(values[:EXAMPLES])]
    return ", ".join(one if len(one) <= SHOWN else f"{one[:SHOWN]}..." for one in some)


def _listed(values: pa.Array) -> list[object]:
    if pa.types.is_timestamp(values.type):  # those of nanoseconds ask for pandas
        return values.cast(pa.timestamp("us", values.type.tz), safe=False).cast(pa.string()).to_pylist()
    return (values.view(pa.binary()) if pa.types.is_string(values.type) else values).to_pylist()
