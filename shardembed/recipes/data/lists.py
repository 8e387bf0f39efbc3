"""A column of lists of ids.

Legend: n rows, m values of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from shardembed.inputs.hashing import U64, mix

Values: TypeAlias = "np.ndarray | Lists"  # of a column


@dataclass(frozen=True)
class Lists:
    """Consecutive rows with a list each, cut and picked like a numpy array.

    Attributes:
        values: int64 `[m]`, list after list.
        lengths: int64 `[n]`.
    """

    values: np.ndarray
    lengths: np.ndarray

    @staticmethod
    def empty(rows: int) -> Lists:
        """That many lists with nothing in them."""
        return Lists(np.empty(0, np.int64), np.zeros(rows, np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.values.nbytes + self.lengths.nbytes

    def __getitem__(self, rows: slice | np.ndarray) -> Lists:
        ends = np.cumsum(self.lengths)
        starts = (ends - self.lengths)[rows]
        lengths = self.lengths[rows]
        if isinstance(rows, slice) and rows.step in (None, 1):
            first = int(starts[0]) if len(starts) else 0
            return Lists(self.values[first : first + int(lengths.sum())], lengths)
        return Lists(self.values[stretches(starts, lengths)], lengths)

    def folded(self) -> np.ndarray:
        """A hash of each list, uint64 `[n]`, in which every value, its place and their number count."""
        ends = np.cumsum(self.lengths)
        starts = ends - self.lengths
        places = np.arange(len(self.values)) - np.repeat(starts, self.lengths)
        hashed = mix(self.values.view(U64) + mix(places.astype(U64) + U64(1)))
        sums = np.append(U64(0), np.cumsum(hashed, dtype=U64))
        return sums[ends] - sums[starts] + mix(self.lengths.astype(U64))


def joined(lists: Sequence[Lists]) -> Lists:
    """One after the other."""
    return Lists(np.concatenate([one.values for one in lists]), np.concatenate([one.lengths for one in lists]))


def stretches(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places from each start on, one stretch after the other: int64 `[sum of lengths]`."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


def has(values: np.ndarray | Lists, value: int) -> np.ndarray:
    """Which rows have `value`, bool `[n]`: of times as their first number."""
    if not isinstance(values, Lists):
        return (values[0] if values.ndim > 1 else values) == value
    rows = np.repeat(np.arange(len(values)), values.lengths)
    return np.bincount(rows[values.values == value], minlength=len(values)) > 0
