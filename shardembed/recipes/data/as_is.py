"""Columns that are not read but carried along, as they stand in a file."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from shardembed.recipes.data.kinds import Kind
from shardembed.recipes.data.lists import Values


@dataclass(frozen=True)
class AsIs:
    """A column, cut and picked like a numpy array.

    Attributes:
        column: what stands there; of text files texts.
        values: what else was read of it, where it is also wanted for that.
    """

    column: pa.Array
    values: Values | None = None

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, rows: slice | np.ndarray) -> AsIs:
        some = self.column[rows] if isinstance(rows, slice) else self.column.take(pa.array(rows))
        return AsIs(some, None if self.values is None else self.values[rows])


def repeated(value: AsIs, count: int) -> AsIs:
    """One value, for `count` rows."""
    return AsIs(pa.repeat(value.column[0], count))


def carried(kind: Kind) -> Kind:
    """A kind whose values are also carried along."""

    def with_column(column: pa.Array, values: Values | None) -> AsIs | None:
        return None if values is None else AsIs(column, values)

    return replace(
        kind,
        fast=lambda column: with_column(column, kind.fast(column)),  # type: ignore[arg-type,return-value]
        typed=lambda column: with_column(column, kind.typed(column)),  # type: ignore[arg-type,return-value]
        slow=lambda values: AsIs(pa.array(values), kind.slow(values)),  # type: ignore[arg-type,return-value]
    )


AS_IS = Kind(AsIs, AsIs, lambda value: None, lambda values: AsIs(pa.array(values)))  # type: ignore[arg-type,return-value]
