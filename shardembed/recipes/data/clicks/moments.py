"""Means and deviations of columns of numbers, whose bits do not depend on which rank has read what.

Legend: n rows, I columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Moments:
    """Of rows that follow each other; of those that follow these the sum, in their order (Chan, Golub and LeVeque, "Updating
    formulae and a pairwise algorithm for computing sample variances", 1979).

    Attributes:
        rows: how many.
        mean: float64 `[I]`.
        squares: the sum of the squares of what rows are off their mean, float64 `[I]`.
    """

    rows: int
    mean: np.ndarray
    squares: np.ndarray

    @staticmethod
    def none(columns: int) -> Moments:
        return Moments(0, np.zeros(columns), np.zeros(columns))

    @staticmethod
    def of(numbers: np.ndarray) -> Moments:
        """Of `[n, I]`."""
        if not len(numbers):
            return Moments.none(numbers.shape[1])
        mean = numbers.mean(0, dtype=np.float64)
        return Moments(len(numbers), mean, ((numbers - mean) ** 2).sum(0))

    def __add__(self, after: Moments) -> Moments:
        rows = self.rows + after.rows
        if not rows:
            return self
        off, share = after.mean - self.mean, after.rows / rows
        return Moments(rows, self.mean + off * share, self.squares + after.squares + off**2 * self.rows * share)

    @property
    def deviation(self) -> np.ndarray:
        """The standard deviation, float64 `[I]`; 1 of a column in which all values are the same."""
        found = np.sqrt(self.squares / max(self.rows, 1))
        return np.where(found > 1e-12 * np.maximum(1, np.abs(self.mean)), found, 1.0)

    def to_json(self) -> tuple[int, list[float], list[float]]:
        return self.rows, self.mean.tolist(), self.squares.tolist()

    @staticmethod
    def from_json(told: Sequence[Any]) -> Moments:
        rows, mean, squares = told
        return Moments(rows, np.array(mean, np.float64), np.array(squares, np.float64))
