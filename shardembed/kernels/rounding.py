"""Stochastic rounding of float32 values to narrow tables, with noise that depends on what is rounded and not on who does it.

A value between two neighbours of the narrow dtype becomes either, with probabilities that keep its mean. The noise of an element
is a hash of (table, row, column, step), so every plan, world size and device rounds alike.

Legend: U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from shardembed.kernels.mixing import GAMMA, mixed, shifted

DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's mantissa
FLOAT16_NORMAL, FLOAT16_SPACING = 2.0**-14, 2.0**-24  # the least normal number, and the distance between those below


class Names(Protocol):
    """Attributes:
    ids_S: the id that each slab row has now, int64.
    """

    ids_S: torch.Tensor


@dataclass(frozen=True)
class Origins:
    """Where slab rows come from.

    Attributes:
        tables_U: a hash of the table of each row, int64 `[U]`.
        rows_U: its row there, int64 `[U]`.
        columns_U: the table's column of its first element, int64 `[U]`.
    """

    tables_U: torch.Tensor
    rows_U: torch.Tensor
    columns_U: torch.Tensor

    def __getitem__(self, piece: slice) -> Origins:
        return Origins(self.tables_U[piece], self.rows_U[piece], self.columns_U[piece])


@dataclass(frozen=True)
class Origin:
    """Where a block of a slab comes from.

    Attributes:
        first: the slab row that the block begins at.
        table: a hash of its table.
        row: what slab row `first` is in that.
        stride: the next slab row is so many rows further in the table.
        column: the table's column of the first element of a row.
    """

    first: int
    table: int
    row: int
    stride: int
    column: int


@dataclass(frozen=True)
class Blocks:
    """The origins of all blocks of a slab, by their first row, as kernels take them.

    Attributes:
        facts: the fields of an `Origin`, int64 `[5, B]`.
    """

    facts: torch.Tensor

    @staticmethod
    def of(origins: Sequence[Origin], device: torch.device) -> Blocks:
        columns = [(b.first, b.table, b.row, b.stride, b.column) for b in sorted(origins, key=lambda origin: origin.first)]
        return Blocks(torch.tensor(columns, dtype=torch.int64).view(-1, 5).T.contiguous().to(device))

    @property
    def count(self) -> int:
        return self.facts.shape[1]

    def of_rows(self, rows_U: torch.Tensor) -> Origins:
        """Where these slab rows come from."""
        block_U = torch.searchsorted(self.facts[0], rows_U, right=True) - 1
        first, tables, starts, strides, columns = self.facts[:, block_U]
        return Origins(tables, starts + (rows_U - first) * strides, columns)


@dataclass(frozen=True)
class Named:
    """The origins of slab rows that ids have, each at any time.

    Attributes:
        table: a hash of their table.
        column: the table's column of the first element of a row.
        names: knows the ids.
    """

    table: int
    column: int
    names: Names

    def of_rows(self, rows_U: torch.Tensor) -> Origins:
        """Where these slab rows come from."""
        return Origins(torch.full_like(rows_U, self.table), self.names.ids_S[rows_U], torch.full_like(rows_U, self.column))


def stochastic(values_UW: torch.Tensor, dtype: torch.dtype, origins: Origins, step: int) -> torch.Tensor:
    """`values_UW` (float32) in `dtype` (bfloat16 or float16), rounded up or down at random; inf and nan stay what they are."""
    noise = _noise(origins, values_UW.shape[1], step)
    dropped = DROPPED_BITS[dtype]
    mask = (1 << dropped) - 1
    bits = values_UW.contiguous().view(torch.int32)
    rounded = ((bits + (noise & mask).to(torch.int32)) & ~mask).view(torch.float32)
    if dtype == torch.float16:
        rounded = torch.where(values_UW.abs() < FLOAT16_NORMAL, _evenly_spaced(values_UW, noise), rounded)
    narrow = rounded.to(dtype)
    return torch.where(torch.isfinite(values_UW) & torch.isfinite(narrow), narrow, values_UW.to(dtype))


def _evenly_spaced(values_UW: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """To multiples of float16's least number: below its normal numbers the spacing no longer shrinks."""
    scaled = values_UW / FLOAT16_SPACING
    below = scaled.floor()
    # Compared and not added: a sum of scaled and noise would itself be rounded, and lift values that need no rounding.
    up = (noise & 0xFFFFFF).to(torch.float32) / 0x1000000 < scaled - below
    return (below + up) * FLOAT16_SPACING


def _noise(origins: Origins, width: int, step: int) -> torch.Tensor:
    """32 random bits an element, as int64 `[U, W]`."""
    rows_U = mixed(mixed(origins.tables_U + stepped(step)) ^ origins.rows_U)
    columns_UW = origins.columns_U.unsqueeze(1) + torch.arange(width, device=rows_U.device)
    return shifted(mixed(rows_U.unsqueeze(1) + columns_UW * GAMMA), 32)


def stepped(step: int) -> int:
    """What a step adds to the hash of a table, wrapped to 64 bits as the tensors' arithmetic does."""
    return (step * GAMMA + (1 << 63)) % (1 << 64) - (1 << 63)


def chance(table: int, ids_U: torch.Tensor, step: int) -> torch.Tensor:
    """A number from 0 to below 1, drawn for each id of a table in a step: float64 `[U]`.

    Args:
        table: a hash of the table.
    """
    hashed = torch.tensor(table, device=ids_U.device) + stepped(step)  # wraps
    return shifted(mixed(mixed(hashed) ^ ids_U), 11).to(torch.float64) * 2.0**-53
