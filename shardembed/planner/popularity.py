"""How often each row of a table is asked for, most popular row first, and what a batch of ids therefore asks of it.

A law answers for single rows (exactly, for as many as one cares to list) and for the rest by a cumulative curve, so that a table
of 10^10 rows costs no more than one of 10^4. Every answer has three lines: what a rank's batch asks, `ids` and `distinct` rows,
and `touched`, the distinct rows of all ranks' batches together.

Uniform, Zipf: n ids drawn independently miss a row of probability q with (1 - q)^n, so it is among them with 1 - (1 - q)^n; sums
of that over many rows are integrals (the midpoint rule, whose error is the change of the slope over 24).

Sampled (Reuse, Counts): a sample of T ids was seen to hold a row c times. A batch rho times as large, rho <= 1, is a random part of
such a sample: each of the c occurrences is in it with rho, so the row is with 1 - (1 - rho)^c (rarefaction: Hurlbert, "The
nonconcept of species diversity", Ecology 1971; exact at rho = 1 by construction, where a Poisson with the measured rates would
forget a third of the rows seen once). Beyond the sample, rho > 1, rows not yet seen get n1 / T of the further ids, n1 the number
of rows seen once (Good, "The population frequencies of species", Biometrika 1953), spread evenly over them: a Poisson number each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from shardembed.planner.workload import Reuse

Array = NDArray[np.float64]
Curve = Callable[[Array], Array]  # positions [n] -> [3, n], summed over all rows before each position
CELLS = 512  # of a cumulative curve, evenly spaced in log(row); the cubic between them is good to nine digits


@dataclass(frozen=True)
class Batch:
    """What asks for rows.

    Attributes:
        samples: of one rank.
        ids: of one rank.
        ranks: how many such batches a step takes together.
    """

    samples: float
    ids: float
    ranks: int


class Law(ABC):
    """The rows of a table from most to least popular; row numbers here are places in that order."""

    rows: int

    @abstractmethod
    def each(self, first: int, stop: int) -> Array:
        """`[3, stop - first]`: ids, distinct, touched of every single row."""

    @abstractmethod
    def curve(self, first: int) -> Curve:
        """The rows from `first` on, summed up to positions between `first` and `rows`."""


def drawn(shares: Array, batch: Batch) -> Array:
    """`[3, ...]` for rows that get `shares` of all ids, each id drawn independently."""
    return np.stack([batch.ids * shares, _among(shares, batch.ids), _among(shares, batch.ids * batch.ranks)])


def _among(shares: Array, ids: float) -> Array:
    if ids < 1.0:  # less than one id: at most that share of it is distinct
        return ids * shares
    with np.errstate(divide="ignore"):  # the only row of a table has share 1
        return -np.expm1(ids * np.log1p(-np.minimum(shares, 1.0)))


class Zipf(Law):
    """Shares in proportion to n^-exponent."""

    def __init__(self, rows: int, exponent: float, batch: Batch) -> None:
        self.rows, self.exponent, self.batch = rows, exponent, batch
        self._scale = 1.0 / self._mass(rows, exponent)

    @staticmethod
    def _mass(rows: int, exponent: float) -> float:
        exact = min(rows, 4096)
        total = float((np.arange(1, exact + 1) ** -exponent).sum())
        low, high, power = exact + 0.5, rows + 0.5, 1.0 - exponent
        if rows > exact:
            total += float(np.log(high / low)) if power == 0.0 else (high**power - low**power) / power
        return total

    def _asked(self, numbers: Array) -> Array:
        return drawn(self._scale * numbers**-self.exponent, self.batch)

    def each(self, first: int, stop: int) -> Array:
        return self._asked(np.arange(first + 1, stop + 1, dtype=np.float64))

    def curve(self, first: int) -> Curve:
        low, high = np.log(first + 0.5), np.log(self.rows + 0.5)
        width = (high - low) / CELLS
        edges = low + width * np.arange(CELLS + 1)
        # Four points a cell by log(row), where the law is smooth: a table of 10^10 rows costs as much as one of 10^4.
        points, weights = np.polynomial.legendre.leggauss(4)
        inner = np.exp(edges[:-1, None] + width * (points + 1.0) / 2.0)
        cells = (self._asked(inner) * inner) @ (weights * width / 2.0)
        sums = np.concatenate([np.zeros((3, 1)), cells.cumsum(1)], 1)
        slopes = self._asked(np.exp(edges)) * np.exp(edges)  # by log(row)

        def summed(positions: Array) -> Array:
            place = (np.log(np.maximum(positions, first) + 0.5) - low) / width
            cell = np.clip(place.astype(np.int64), 0, CELLS - 1)
            return _hermite(place - cell, sums[:, cell], sums[:, cell + 1], width * slopes[:, cell], width * slopes[:, cell + 1])

        return summed


def _hermite(t: Array, start: Array, stop: Array, start_slope: Array, stop_slope: Array) -> Array:
    """The cubic through two values with two slopes, t from 0 to 1."""
    rest = 1.0 - t
    return rest**2 * ((1.0 + 2.0 * t) * start + t * start_slope) + t**2 * ((1.0 + 2.0 * rest) * stop - rest * stop_slope)


@dataclass(frozen=True)
class Sample:
    """How often rows were seen among some ids.

    Attributes:
        ids: how many there were.
        once: rows seen once.
        unseen: rows not seen.
    """

    ids: float
    once: float
    unseen: float

    def asked(self, counts: Array, batch: Batch) -> Array:
        """`[3, ...]` for rows that were seen `counts` times (below 1: with that probability, once)."""
        own, together = self._ratio(batch, 1), self._ratio(batch, batch.ranks)
        return np.stack([counts * self._ids(own), self._seen(counts, own), self._seen(counts, together)])

    def new(self, batch: Batch) -> Array:
        """`[3]` for one row that was not seen."""
        if not self.unseen:
            return np.zeros(3)
        own, together = (max(0.0, self._ratio(batch, ranks) - 1.0) * self.once / self.unseen for ranks in (1, batch.ranks))
        return np.array([own, -np.expm1(-own), -np.expm1(-together)])

    def _ratio(self, batch: Batch, ranks: int) -> float:
        return batch.ids * ranks / self.ids

    def _ids(self, ratio: float) -> float:
        return ratio if ratio <= 1.0 or not self.unseen else 1.0 + (ratio - 1.0) * (1.0 - self.once / self.ids)

    @staticmethod
    def _seen(counts: Array, ratio: float) -> Array:
        present = np.minimum(counts, 1.0)
        return present if ratio >= 1.0 else present * -np.expm1(np.maximum(counts, 1.0) * np.log1p(-ratio))


class Observed(Law):
    """The classes of a reuse histogram, rows of a class alike.

    Its batch of `batch_size` samples had rows of every class in fixed proportion to ids. A table with L ids a sample is taken to
    have had L * batch_size ids there, `accesses[i]` of them in class i, on as many rows as that makes at the class's mean count.
    A table with fewer rows than that has them merged: each gets the ids of several.
    """

    def __init__(self, rows: int, reuse: Reuse, batch: Batch) -> None:
        self.rows, self.batch = rows, batch
        accesses = np.array(reuse.accesses)[::-1] / sum(reuse.accesses)
        means = class_means(reuse)[::-1]
        ids = batch.ids / batch.samples * reuse.batch_size
        held = ids * accesses / means
        merged = max(1.0, held.sum() / rows)
        once = float(held[means == 1.0].sum()) if merged == 1.0 else 0.0
        self.sample = Sample(ids, once, max(0.0, rows - float(held.sum())) if merged == 1.0 else 0.0)
        self._counts = np.append(means * merged, 0.0)
        self._edges = np.concatenate([[0.0], (held / merged).cumsum(), [float(rows)]])
        self._edges[-2] = min(self._edges[-2], rows)

    def each(self, first: int, stop: int) -> Array:
        below = np.concatenate([[0.0], (self._counts * np.diff(self._edges)).cumsum()])
        counts = np.diff(np.interp(np.arange(first, stop + 1), self._edges, below))
        seen = np.clip(self._edges[-2] - np.arange(first, stop), 0.0, 1.0)  # one row may lie on the edge of what was seen
        return self.sample.asked(counts, self.batch) + (1.0 - seen) * self.sample.new(self.batch)[:, None]

    def curve(self, first: int) -> Curve:
        edges = np.maximum(self._edges, first)
        rates = self.sample.asked(self._counts, self.batch)
        rates[:, -1] = self.sample.new(self.batch)
        sums = np.concatenate([np.zeros((3, 1)), (rates * np.diff(edges)).cumsum(1)], 1)
        return lambda positions: np.stack([np.interp(positions, edges, line) for line in sums])


def class_means(reuse: Reuse) -> Array:
    """How often a row of each class occurs in the batch, on average.

    The histogram gives it as a quotient, but rounds the shares of the few hottest rows to nothing: then the middle of the class,
    if rows fall off as 1 / count^2, is taken; of the last, open one, twice its lower bound.
    """
    uppers = np.array(reuse.bounds)
    lowers = np.concatenate([[0.0], uppers[:-1]])
    accesses, touched = np.array(reuse.accesses), np.array(reuse.touched_rows)
    middles = np.where(np.isfinite(uppers), np.maximum(lowers, 1.0) / np.log(2.0), 2.0 * lowers)
    exact = np.divide(accesses * reuse.ids, touched * reuse.distinct, out=middles, where=touched > 0.002)  # else too few digits
    return np.clip(exact, np.floor(lowers) + 1.0, uppers)


class Rows:
    """Measured counts by row number: the most popular rows, and sums over small blocks of all others.

    What depends on the counts alone is worked out once. Where rows are many, those of a block are put into classes of nearly equal
    counts (the same up to 64, then within a sixteenth of an octave), so that another batch size costs a pass over classes only.
    """

    BLOCKS, HOT, EXACT, FINE = 1 << 16, 1 << 12, 64, 16

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self.counts, self.rows = counts, len(counts)
        self.sample = Sample(float(counts.sum()), float((counts == 1).sum()), float((counts == 0).sum()))

    @cached_property
    def _classes(self) -> NDArray[np.int16]:
        """The class of each row; rows with higher counts are in higher classes."""
        found = np.minimum(self.counts, self.EXACT).astype(np.int16)
        high = self.counts > self.EXACT
        octaves = np.log2(self.counts[high].astype(np.float64) / self.EXACT)
        found[high] = self.EXACT + 1 + (self.FINE * octaves).astype(np.int16)
        return found

    @cached_property
    def hot(self) -> NDArray[np.int64]:
        """All rows of a small table; else at most `HOT` of the most popular ones, ascending."""
        if self.rows <= self.BLOCKS:
            return np.arange(self.rows)
        above = np.bincount(self._classes)[::-1].cumsum()[::-1]
        return np.flatnonzero(self._classes >= np.searchsorted(-above, -self.HOT))

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return np.linspace(0, self.rows, self.BLOCKS + 1).astype(np.int64)

    @cached_property
    def _held(self) -> tuple[NDArray[np.intp], NDArray[np.intp], Array, Array]:
        """(block, class, rows in both) where there are any but hot ones, and the mean count of each class."""
        classes = self._classes
        many = int(classes.max()) + 1
        rows = np.bincount(classes, minlength=many)
        means = np.bincount(classes, self.counts, many) / np.maximum(rows, 1)
        held = np.zeros(self.BLOCKS * many, np.int64)
        step = 1 << 10
        for first in range(0, self.BLOCKS, step):  # no long array of int64 a row at once
            low, high = self._edges[first], self._edges[first + step]
            block = np.repeat(np.arange(step), np.diff(self._edges[first : first + step + 1]))
            part = block * many + classes[low:high]
            held[first * many : (first + step) * many] = np.bincount(part, minlength=step * many)
        block = np.searchsorted(self._edges, self.hot, "right") - 1
        np.subtract.at(held, block * many + classes[self.hot], 1)
        where = np.flatnonzero(held)
        return where // many, where % many, held[where].astype(np.float64), means

    def each(self, batch: Batch) -> Array:
        """`[3, len(hot)]`."""
        asked = self.sample.asked(self.counts[self.hot].astype(np.float64), batch)
        return np.where(self.counts[self.hot] > 0, asked, self.sample.new(batch)[:, None])

    def curve(self, batch: Batch) -> Curve:
        """All rows but the hot ones, up to any position; blocks of rows count as even inside."""
        if len(self.hot) == self.rows:
            return lambda positions: np.zeros((3, len(positions)))
        block, classes, held, means = self._held
        asked = self.sample.asked(means, batch)
        asked[:, 0] = self.sample.new(batch)
        sums = np.stack([np.bincount(block, held * line[classes], self.BLOCKS) for line in asked]).cumsum(1)
        sums = np.concatenate([np.zeros((3, 1)), sums], 1)
        return lambda positions: np.stack([np.interp(positions, self._edges, line) for line in sums])
