"""The layout of messages: tensors of every slab in one buffer of bytes, grouped by the rank they go to.

    buffer = | to rank 0: part 0, part 1, ... | to rank 1: part 0, part 1, ... | ...

What a part has for one rank is a chunk. Each starts at a multiple of 16 bytes, so that every dtype can be viewed in place. Both
sides know how many items a chunk has (from the counts message), so nothing else is sent. All numbers are arrays, so that nothing
here walks over ranks.

Legend: P parts, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray

ALIGNMENT = 16
Numbers = NDArray[np.int64]


def aligned(sizes: Numbers) -> Numbers:
    """Bytes with the padding behind them."""
    return (sizes + (ALIGNMENT - 1)) & -ALIGNMENT


@dataclass(frozen=True)
class Part:
    """One tensor of a message, as it travels: `[items, *item_shape]` in the order of the ranks.

    Attributes:
        dtype: that it travels in.
        item_shape: of each item.
        implied: what items hold that do not travel; None where all do.
    """

    dtype: torch.dtype
    item_shape: tuple[int, ...] = ()
    implied: int | None = None

    @property
    def item_bytes(self) -> int:
        return prod(self.item_shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Schema:
    """What a kind of message consists of, which no batch changes.

    Attributes:
        parts: in the order in which they stand.
    """

    parts: tuple[Part, ...]

    @cached_property
    def item_bytes(self) -> Numbers:
        """`[P]`."""
        return np.array([part.item_bytes for part in self.parts], dtype=np.int64)

    @cached_property
    def implying(self) -> tuple[int, ...]:
        """The numbers of the parts of which some items need not travel."""
        return tuple(number for number, part in enumerate(self.parts) if part.implied is not None)


@dataclass(frozen=True)
class MessageLayout:
    """Where the parts of one message lie.

    Attributes:
        schema: its parts.
        items: how many of each part's tensor belong to each rank, int64 `[P, R]`.
        counts: how many of them travel, all or none of a rank's, int64 `[P, R]`.
    """

    schema: Schema
    items: Numbers
    counts: Numbers

    @staticmethod
    def of(parts: Schema | Sequence[Part], items: Numbers, counts: Numbers | None = None) -> MessageLayout:
        """counts: all items where it is None."""
        items = np.ascontiguousarray(items, dtype=np.int64)
        counts = items if counts is None else np.ascontiguousarray(counts, dtype=np.int64)
        return MessageLayout(parts if isinstance(parts, Schema) else Schema(tuple(parts)), items, counts)

    @cached_property
    def sizes(self) -> Numbers:
        """Bytes of each part for each rank, without padding, `[P, R]`."""
        return self.counts * self.schema.item_bytes[:, None]

    @cached_property
    def rank_bytes(self) -> Numbers:
        """Bytes for each rank, `[R]`."""
        return aligned(self.sizes).sum(0)

    @cached_property
    def rank_sizes(self) -> list[int]:
        """The same, as collectives want it."""
        return self.rank_bytes.tolist()

    @cached_property
    def totals(self) -> list[int]:
        """Items of each part's tensor."""
        return self.items.sum(1).tolist()

    @cached_property
    def tensor_bytes(self) -> Numbers:
        """Bytes of each part's tensor, `[P]`."""
        return self.items.sum(1) * self.schema.item_bytes

    @cached_property
    def dense(self) -> bool:
        """A lone part without padding: the bytes of its tensor are the message."""
        return len(self.schema.parts) == 1 and self.counts is self.items and not (self.sizes % ALIGNMENT).any()
