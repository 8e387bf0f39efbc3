"""Single values of a row: what they must look like, and the sentence for those that do not.

Categories are hexadecimal numbers of up to 32 bits, as the published files have them. `int` would take more than that ("0x1",
"1_0"), so patterns decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardembed.inputs.hash64 import hash64
from shardembed.inputs.names import Names
from shardembed.recipes.data.bad import FIELDS, Problem
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.wanted import MISSING

INTEGER = re.compile(r"-?[0-9]{1,18}")
CATEGORY = re.compile(r"[0-9a-fA-F]{1,8}")
SHOWN = 40
REPLACED = "\ufffd"  # in the place of what is no UTF-8
EMPTY = -0x10B924C8AE271667  # the id of an empty text


def problem_of(fields: Sequence[str], schema: Schema, where: str) -> Problem | None:
    """What is wrong with the fields of a text row; None where nothing is."""
    if len(fields) != len(schema.names):
        said = f"{where}: {len(fields)} field(s), but a row has {schema}, with a tab between two"
        return Problem(FIELDS, said + _delimited_by(fields, len(schema.names)))
    for number, (name, text) in enumerate(zip(schema.names, fields, strict=True), 1):
        found = _problem(number, text, schema)
        if found is not None:
            kind, said = found
            return Problem(kind, f"{where}: column {name!r} (field {number}): {said}")
    return None


def _delimited_by(fields: Sequence[str], count: int) -> str:
    """A hint where another sign seems to stand between fields."""
    for sign, name in (",", "commas"), (";", "semicolons"), ("|", "bars"), (" ", "blanks"):
        if len(fields) == 1 and fields[0].count(sign) == count - 1:
            return f"; this one has {name} there: replace them, or write the data as Parquet"
    return ""


def _problem(number: int, text: str, schema: Schema) -> tuple[str, str] | None:
    if number == 1:
        return None if text in ("0", "1") else ("no label", no_label(text))
    if text and number <= len(schema.integers) + 1:
        return None if INTEGER.fullmatch(text) else ("not an integer", f"{short(text)} is not an integer; leave missing ones empty")
    if schema.any_id:
        return ("not UTF-8", f"{short(text)} is not UTF-8; convert the file") if REPLACED in text else None
    return None if not text or CATEGORY.fullmatch(text) else ("no category", no_category(text))


def no_label(value: object) -> str:
    hint = "; files of this layout have no header line" if isinstance(value, str) and re.match("[A-Za-z_]", value) else ""
    return f"{short(value)} is no label, which is 0 or 1{hint}"


def no_category(value: object) -> str:
    if isinstance(value, int):
        return f"{value} is no category: integers must be above -2^63 and below 2^63"
    return f"{short(value)} is no category, which is 1 to 8 hexadecimal digits; leave missing ones empty"


def category(text: str) -> int:
    return int(text, 16) if text else MISSING


def ids_of_texts(texts: Any, names: Names | None) -> np.ndarray:
    """int64 `[n]` of texts that are ids, `MISSING` of empty ones and of None; names: keeps which has which."""
    found = hash64(texts, null=MISSING, names=names)
    return np.where(found == EMPTY, MISSING, found)


def categories_of(texts: Sequence[str]) -> np.ndarray | None:
    """int64 `[n]` of texts; None where one of them is no category."""
    # One match over all of them together costs a tenth of one for each.
    if texts and not _ALL.fullmatch("\n".join(texts)):
        return None
    return np.fromiter((int(text, 16) for text in texts), np.int64, len(texts))


_ALL = re.compile(r"[0-9a-fA-F]{1,8}(?:\n[0-9a-fA-F]{1,8})*")


def short(value: object) -> str:
    text = "a missing value" if value is None or value == "" else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
