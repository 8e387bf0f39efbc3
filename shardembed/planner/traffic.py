"""What batches ask of a table and of any part of its rows: ids, distinct rows, and rows that some rank touches.

The most popular rows are placed one by one, because one of them can make its block busy; all others are summed (`popularity`).
Where popular rows come first ("sorted"), or may do so ("unknown"), their place is their row number. In "hashed" order it is drawn
by a fixed hash of the row's popularity and the size of the table: nobody knows where the hot rows of a real table lie, but that
they lie somewhere, and not spread over all blocks, is part of what a cut by rows costs. Equal tables get equal draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from shardembed.planner import popularity
from shardembed.planner.popularity import Array, Batch, Curve, Law
from shardembed.planner.workload import Counts, Order, Reuse, Skew, TableLoad, Uniform, Zipf

HOT = 2048  # rows placed one by one
STRIDE_HOT = 16  # times the stride: what a stride deals out one by one, where popular rows come first


@dataclass(frozen=True, eq=False)
class Asked:
    """What is asked of n blocks of rows, each array `[n]`.

    Attributes:
        ids: by one rank's batch.
        distinct: rows, by one rank's batch.
        touched: rows, by all ranks' batches together.
    """

    ids: Array
    distinct: Array
    touched: Array


@dataclass(frozen=True, eq=False)
class Profile:
    """Where a table's traffic falls.

    Attributes:
        rows: of the table.
        hot_H: row numbers of the most popular ones, int64, ascending.
        sums: `[3, H + 1]`: what is asked of all hot rows before each, as in `Asked`.
        rest: the curve of all other rows.
        longer: the same with more hot rows, where that places more of them truly; None where it does not.
    """

    rows: int
    hot_H: NDArray[np.int64]
    sums: Array
    rest: Curve
    longer: Callable[[int], Profile] | None = None
    _strides: dict[int, Array] = field(default_factory=dict)

    def before(self, positions: NDArray[np.int64]) -> Array:
        """`[3, n]`: of all rows before each position."""
        return self.sums[:, np.searchsorted(self.hot_H, positions)] + self.rest(positions.astype(np.float64))

    def residues(self, step: int) -> Array:
        """`[3, step]`: of the rows with each residue."""
        if step not in self._strides:
            source = self if self.longer is None else self.longer(STRIDE_HOT * step)
            each = np.diff(source.sums, axis=1)
            where = source.hot_H % step
            placed = np.stack([np.bincount(where, line, step) for line in each])
            others = np.ceil((self.rows - np.arange(step)).clip(0) / step) - np.bincount(where, minlength=step)
            rate = source.rest(np.array([float(self.rows)])) / max(1.0, others.sum())
            self._strides[step] = placed + rate * others
        return self._strides[step]


@dataclass(frozen=True, eq=False)
class Traffic:
    """A table's traffic.

    Attributes:
        rows: of the table.
        ids: expected in a rank's batch, all features together.
        distinct: expected distinct rows in a rank's batch.
        touched: expected distinct rows of all ranks' batches together.
        bags: of a rank, a feature.
        lengths: mean ids of a bag, a feature.
        place: finds out where among the rows it falls, for who cuts them.
    """

    rows: int
    ids: float
    distinct: float
    touched: float
    bags: tuple[float, ...]
    lengths: tuple[float, ...]
    place: Callable[[], Profile]

    @cached_property
    def profile(self) -> Profile:
        """Where among the rows it falls."""
        return self.place()

    @staticmethod
    def of(load: TableLoad, batch: float, ranks: int) -> Traffic:
        """batch: samples of one rank."""
        lengths = tuple(float(length) for length in load.ids_per_sample)
        rows = load.table.num_embeddings
        asking = Batch(float(batch), batch * sum(lengths), ranks)
        # Ids of a dynamic table lie where a mix of their bits puts them, whatever their popularity.
        order: Order = load.order if load.table.dynamic is None else "hashed"
        place = partial(_profile, load.skew, order, rows, asking)
        ids, distinct, touched = _total(load.skew, rows, asking) or (float(n) for n in place().before(np.array([rows]))[:, 0])
        return Traffic(rows, ids, distinct, touched, (float(batch),) * len(lengths), lengths, place)

    def blocks(self, rows: Sequence[range]) -> Asked:
        """What is asked of each block: contiguous rows, or one residue of a stride.

        Raises:
            ValueError: a range that is neither, or has rows that the table has not.
        """
        first, stop, step = np.array([(r.start, r.stop, r.step) for r in rows], np.int64).reshape(-1, 3).T
        strided = step > 1
        bad = (first < 0) | (stop > self.rows) | (step < 1) | (strided & ((first >= step) | (stop != self.rows)))
        if bad.any():
            block = rows[int(bad.argmax())]
            raise ValueError(f"{block} of {self.rows} rows is neither contiguous nor all rows of one residue")
        whole = (first == 0) & (stop == self.rows) & ~strided
        asked = np.empty((3, len(rows)))
        asked[:, whole] = np.array([[self.ids], [self.distinct], [self.touched]])
        if whole.all():
            return Asked(*asked)
        for stride in np.unique(step[strided]).tolist():
            asked[:, step == stride] = self.profile.residues(stride)[:, first[step == stride]]
        part = ~strided & ~whole
        low, high = first[part], np.maximum(first, stop)[part]
        asked[:, part] = self.profile.before(high) - self.profile.before(low)
        return Asked(*np.maximum(asked, 0.0))


@lru_cache(maxsize=1024)
def _profile(skew: Skew, order: Order, rows: int, batch: Batch) -> Profile:
    if isinstance(skew, Counts):  # by row number: their order is known
        measured = _measured(skew)
        return Profile(rows, measured.hot, _summed(measured.each(batch)), measured.curve(batch))
    if isinstance(skew, Uniform):
        rate = popularity.drawn(np.array([1.0 / rows]), batch)
        return Profile(rows, np.empty(0, np.int64), np.zeros((3, 1)), lambda positions: rate * positions)
    law = _law(skew, rows, batch)
    return _hashed(law, HOT) if order == "hashed" else _sorted(law, HOT)


def _law(skew: Zipf | Reuse, rows: int, batch: Batch) -> Law:
    return popularity.Zipf(rows, skew.exponent, batch) if isinstance(skew, Zipf) else popularity.Observed(rows, skew, batch)


@lru_cache(maxsize=1024)
def _total(skew: Skew, rows: int, batch: Batch) -> tuple[float, float, float] | None:
    """Of all rows together, wherever they lie: ids, distinct, touched. None where no law tells."""
    if not isinstance(skew, Zipf | Reuse):
        return None
    law, hot = _law(skew, rows, batch), min(HOT, rows)
    found = law.each(0, hot).sum(1)
    if hot < rows:
        found = found + law.curve(hot)(np.array([float(rows)]))[:, 0]
    return float(found[0]), float(found[1]), float(found[2])


@lru_cache(maxsize=64)
def _measured(skew: Counts) -> popularity.Rows:
    return popularity.Rows(skew.counts)


def _sorted(law: Law, hot: int) -> Profile:
    hot = min(hot, law.rows)
    rest = law.curve(hot) if hot < law.rows else _nothing
    return Profile(law.rows, np.arange(hot), _summed(law.each(0, hot)), rest, lambda more: _sorted(law, max(hot, more)))


def _hashed(law: Law, hot: int) -> Profile:
    hot = min(hot, law.rows)
    places = hashed_places(law.rows, hot)
    order = places.argsort()
    total = law.curve(hot)(np.array([float(law.rows)])) if hot < law.rows else np.zeros((3, 1))
    rate, at = total / max(1, law.rows - hot), places[order]

    def rest(positions: Array) -> Array:
        return rate * (positions - at.searchsorted(positions))

    return Profile(law.rows, at, _summed(law.each(0, hot)[:, order]), rest)


def _nothing(positions: Array) -> Array:
    return np.zeros((3, len(positions)))


def _summed(each: Array) -> Array:
    return np.concatenate([np.zeros((3, 1)), each.cumsum(1)], 1)


@lru_cache(maxsize=1024)
def hashed_places(rows: int, hot: int) -> NDArray[np.int64]:
    """`[hot]` different row numbers, from the most popular row on."""
    if rows <= 8 * hot:
        return _mixed(np.arange(rows, dtype=np.uint64), rows).argsort(kind="stable")[:hot]
    numbers = np.arange(hot, dtype=np.uint64)
    places = np.empty(hot, np.int64)
    again = np.arange(hot)
    while len(again):
        places[again] = (_mixed(numbers[again], rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53 * rows
        _, kept = np.unique(places, return_index=True)
        again = np.setdiff1d(np.arange(hot), kept)  # taken already: draw anew
        numbers[again] += np.uint64(hot)
    return places


def _mixed(numbers: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) over a counter."""
    golden = 0x9E3779B97F4A7C15
    mixed = (numbers + np.uint64(1 + (seed * golden) % (1 << 64) % (1 << 62))) * np.uint64(golden)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
