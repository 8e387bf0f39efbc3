"""What a model asks of its tables: sizes, ids a sample, and how often ids repeat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.optim import RowwiseAdagrad, TableOptimizer
from shardembed.tables import TableConfig


@dataclass(frozen=True)
class Uniform:
    """Every row is asked for equally often."""


@dataclass(frozen=True)
class Zipf:
    """The n-th most popular row is asked for in proportion to n^-exponent."""

    exponent: float


@dataclass(frozen=True, eq=False)
class Reuse:
    """How often production traffic repeats rows: shares of touched rows, and of accesses, that fall to rows which a batch of
    `batch_size` samples asks for at most `bounds[i]` times (and more than `bounds[i - 1]` times).
    """

    name: str
    batch_size: int
    ids: float
    distinct: float
    bounds: tuple[float, ...]
    touched_rows: tuple[float, ...]
    accesses: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Counts:
    """How often each row was asked for in the user's data, by row number, `[num_embeddings]`. The order of rows is known then."""

    counts: NDArray[np.int64]


Skew = Uniform | Zipf | Reuse | Counts
Order = Literal["sorted", "hashed"]  # popular rows come first; or lie anywhere


@dataclass(frozen=True)
class TableLoad:
    """A table and its traffic. ids_per_sample: mean ids a sample, one a feature of the table, in the order of its features."""

    table: TableConfig
    ids_per_sample: tuple[float, ...]
    skew: Skew = field(default_factory=Uniform)
    order: Order = "hashed"
    optimizer: TableOptimizer = field(default_factory=RowwiseAdagrad)


@dataclass(frozen=True)
class Workload:
    """All tables of a model. global_batch_size: samples a step, over all ranks together. wire_dtype: of vectors on the wire; None
    is the table's own.
    """

    name: str
    global_batch_size: int
    tables: tuple[TableLoad, ...]
    wire_dtype: torch.dtype | None = None
