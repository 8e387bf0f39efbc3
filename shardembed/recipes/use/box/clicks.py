"""How likely clicks are, for rows of columns as the run's data have them.

Legend: n rows, I numbers, F tables, D columns.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .files import Integers
from .ids import Refused, Table, hashed, id_of
from .retrieval import checked_rows

MISSING = -(1 << 63)  # the id of what is missing, in tables that take any
HEXADECIMAL = re.compile(r"[0-9a-fA-F]{1,8}")
NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
ABSENT = ("", "nan", "NaN", "NAN", "NA", "N/A", "null", "NULL", "None")


class Column:
    """One that has a table: what makes the ids of a value, and vectors of these."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.name, self._kind, self._settings = settings["name"], settings["kind"], settings
        self._table = Table(folder, settings["stem"], settings)
        self._values = self._value_rows = None
        if settings["rows"] == "vocabulary":
            self._values, self._value_rows = (
                Integers(folder / f"{settings['stem']}.{one}.npy") for one in ("values", "value_rows")
            )
        self._buckets = settings.get("buckets")

    def vectors(self, values: Sequence[Any]) -> torch.Tensor:
        """float32 `[n, D]`."""
        if self._buckets is not None:
            return self._table.of(
                [bisect_right(self._buckets, 0.0 if math.isnan(x) else x) for x in (number(self.name, one) for one in values)]
            )
        if self._kind != "ids":
            return self._table.of([self._id(value) for value in values])
        lists = [[self._id(one) for one in self._listed(value)] for value in values]
        rows = self._table.of([one for some in lists for one in some])
        lengths = torch.tensor([len(some) for some in lists])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]]) if len(lists) else lengths
        if not len(rows):
            return torch.zeros(len(lists), rows.shape[1])
        mode = self._settings["pooling"]
        return torch.nn.functional.embedding_bag(torch.arange(len(rows)), rows, offsets, mode=mode)

    def _listed(self, value: Any) -> list[Any]:
        if value is None:
            return []
        separator = self._settings.get("separator")
        if isinstance(value, str):
            parts = [part.strip(" \t") for part in (value.split(separator) if separator else [value])]
        else:
            parts = value if isinstance(value, list) else [value]
        return [part for part in parts if not _absent(part, self._settings["texts"])]

    def _id(self, value: Any) -> int:
        """What the table is asked for: an id, or the number of a row."""
        how = self._settings["rows"]
        if _absent(value, self._settings["texts"] or self._settings["hexadecimal"]):
            return MISSING if how == "dynamic" else 0
        number = self._number(value)
        if how == "dynamic":
            return number
        if how == "vocabulary":
            assert self._values is not None
            assert self._value_rows is not None
            place = self._values.find(number)
            return self._value_rows[place] if place >= 0 else 0
        return hashed(number, len(self._table.weight), self._settings["seed"], 1)

    def _number(self, value: Any) -> int:
        if self._settings["hexadecimal"] and isinstance(value, str):
            if not HEXADECIMAL.fullmatch(value):
                raise Refused(f"{self.name}: {value[:40]!r} is no category, which is 1 to 8 hexadecimal digits")
            return int(value, 16)
        if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
            value = int(value)
        return id_of(value, self._settings["texts"], self.name)


class Clicks:
    """A model that predicts clicks."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._columns = [Column(folder, one) for one in settings["columns"]]
        self._numbers = settings["numbers"]
        self._least = settings["least"]
        self._known = {*(one.name for one in self._columns), *(one["name"] for one in self._numbers)}
        self._dense = torch.export.load(folder / "dense.pt2").module()

    def about(self) -> dict[str, Any]:
        return {"columns": sorted(self._known)}

    @torch.inference_mode()
    def score(self, rows: Any) -> dict[str, Any]:
        """A probability a row. Columns that a row lacks are missing values.

        Raises:
            Refused: the rows cannot be scored.
        """
        found = checked_rows(rows)
        for place, row in enumerate(found):
            for name in row:
                if name not in self._known:
                    raise Refused(f"row {place}: there is no column {name!r}; the columns are {', '.join(sorted(self._known))}")
        if not found:
            return {"predictions": []}
        vectors = [column.vectors([row.get(column.name) for row in found]) for column in self._columns]
        dense = torch.tensor(
            [[self._scaled(one, row.get(one["name"])) for one in self._numbers] for row in found], dtype=torch.float32
        )
        logits = self._dense(dense.view(len(found), len(self._numbers)), torch.stack(vectors, 1))
        return {"predictions": torch.sigmoid(logits.double()).float().tolist()}

    def _scaled(self, column: dict[str, Any], value: Any) -> float:
        x = (
            torch.tensor(number(column["name"], value), dtype=torch.float32)
            .nan_to_num(0.0)
            .clamp(min=-math.inf if self._least is None else self._least)
        )
        return float(torch.sign(x) * torch.log1p(x.abs()) if column["log"] else x)


def number(name: str, value: Any) -> float:
    """NaN where it is missing.

    Raises:
        Refused: it is none.
    """
    if _absent(value, False):
        return math.nan
    if isinstance(value, str):
        if not NUMBER.fullmatch(value):
            raise Refused(f"{name}: {value[:40]!r} is no number")
        value = float(value)
    if not isinstance(value, int | float):
        raise Refused(f"{name} must be a number, not {type(value).__name__}")
    found = float(torch.tensor(float(value), dtype=torch.float32)) if abs(value) < 1e39 else math.inf
    if math.isinf(found):
        raise Refused(f"{name}: {str(value)[:40]} is infinite in 32 bits")
    return found


def _absent(value: Any, texts: bool) -> bool:
    """Python's own JSON has a NaN, which is what pandas makes of what is missing."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and (value == "" or (not texts and value in ABSENT)))
