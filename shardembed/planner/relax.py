"""What a lower bound may know of an option: the figures that hold wherever its parts are put.

For any solution, with Z[p] the slowest rank's seconds of phase p without what all ranks do alike:

    Z[p] >= sum over items of total[p] / R                 the mean is no more than the slowest
    Z[p] >= largest[p] of every chosen option              some rank holds the largest part
    R x capacity >= sum over items of memory               and no rank holds more than it can
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardembed.planner.problem import Array, Option, Problem

INTERVALS = 8  # of the largest share, an octave


@dataclass(frozen=True)
class Figures:
    """Lines that stand for the n ways to lay out one item.

    Attributes:
        option: `[n]`, the number of an option near the line.
        charges: names of the fixed charges that each line uses.
        common: `[n]` seconds, all phases together, on every rank.
        mean: `[n, P]` seconds of a rank if all were balanced.
        largest: `[n, P]` seconds of the largest part.
        memory: `[n]` bytes of a rank if all were balanced.
        least: `[n]` bytes that some rank must have at least.
    """

    option: NDArray[np.intp]
    charges: tuple[frozenset[str], ...]
    common: Array
    mean: Array
    largest: Array
    memory: Array
    least: Array

    def fitting(self, capacity: float) -> NDArray[np.bool_]:
        """Which lines fit into a rank's memory, to the last digits."""
        return fits(self.least, capacity)

    def only(self, kept: Sequence[int]) -> Figures:
        index = np.asarray(kept, dtype=np.intp)
        charges = tuple(self.charges[number] for number in kept)
        columns = (self.common, self.mean, self.largest, self.memory, self.least)
        return Figures(self.option[index], charges, *(column[index] for column in columns))


def fits(least: Array, capacity: float) -> NDArray[np.bool_]:
    """Whether what some rank must hold at least is no more than it can, to the last digits."""
    return least <= capacity * (1 + 1e-9)


def figures(options: tuple[Option, ...], ranks: int) -> Figures:
    """One line an option; options with `sharing` stand for every way to share, by the largest share, an interval a line."""
    single = [number for number, option in enumerate(options) if option.sharing is None]
    shared: dict[int, list[int]] = {}
    for number, option in enumerate(options):
        if option.sharing is not None:
            shared.setdefault(id(option.sharing), []).append(number)
    parts = [_single(single, [options[number] for number in single], ranks)] if single else []
    parts += [_shared(numbers, options, ranks) for numbers in shared.values()]
    charges = tuple(names for part in parts for names in part.charges)
    columns = zip(*((p.option, p.common, p.mean, p.largest, p.memory, p.least) for p in parts), strict=True)
    option, *others = (np.concatenate(column) for column in columns)
    return Figures(option, charges, *others)


def _single(numbers: list[int], options: list[Option], ranks: int) -> Figures:
    total, largest = (np.array([getattr(option, name) for option in options]) for name in ("total", "largest"))
    bytes_, most, held = np.array([(option.bytes, option.most, option.common_memory) for option in options]).T
    # Of divisible options, some rank holds at least one part, and at least the mean; where an option stands for finer cuts too,
    # the mean is all that is known.
    fewest = np.array([ranks if option.cuttable else min(option.divisible, ranks) for option in options])
    cut = fewest > 0
    largest[cut], most[cut] = total[cut] / fewest[cut, None], bytes_[cut] / fewest[cut]
    common = np.array([option.common for option in options]).sum(1)
    charges = tuple(option.charges for option in options)
    return Figures(np.array(numbers), charges, common, total / ranks, largest, bytes_ / ranks + held, most + held)


def _shared(numbers: list[int], options: tuple[Option, ...], ranks: int) -> Figures:
    """With q the largest share, low <= q <= high: the largest part has loads of at least those of `low`. And since g is concave and
    every share is q at most, each has g(p) >= p g(high) / high answers, so all together have g(high) / high at least.
    """
    first = options[numbers[0]]
    sharing = first.sharing
    assert sharing is not None
    counts = np.array([options[number].parts for number in numbers])
    octaves = np.log2(ranks)
    edges = 2.0 ** -np.linspace(octaves, 0.0, max(2, int(np.ceil(octaves * INTERVALS)) + 1))
    low, high = edges[:-1], edges[1:]
    answers = sharing.answers(high) / high
    more = answers - first.parts * float(sharing.answers(np.array([1.0 / first.parts]))[0])
    common = float(first.common.sum()) + more * float(sharing.common_answer.sum())
    held = first.common_memory + more * sharing.memory_common
    mean = (sharing.linear + answers[:, None] * sharing.answer) / ranks
    memory = (sharing.memory_linear + answers * sharing.memory_answer) / ranks
    near = np.abs(np.log(counts * np.sqrt(low * high)[:, None])).argmin(1)
    option = np.array(numbers)[near]
    return Figures(option, (first.charges,) * len(low), common, mean, sharing.loads(low), memory + held, sharing.memory(low) + held)


def undominated(found: Figures, capacity: float, floor: Array) -> Figures:
    """The lines that a bound has to consider: those that fit, without those that another one is no worse than in every figure.

    floor: `[P]`, seconds that every solution's slowest rank has anyway; a largest part below it says nothing.
    """
    fitting = np.flatnonzero(found.fitting(capacity))
    if not len(fitting):
        return found.only([])
    rows = np.column_stack([found.common, found.mean, np.maximum(found.largest, floor), found.memory])[fitting]
    sets = list(dict.fromkeys(found.charges[line] for line in fitting))
    kinds = np.array([sets.index(found.charges[line]) for line in fitting])
    fewer = np.array([[one <= other for other in sets] for one in sets])
    # Of lines that are worth the same the first stays, so that dropped ones always have one that stays and is no worse.
    sizes = np.array([len(names) for names in sets])[kinds]
    order = np.lexsort((fitting, sizes, *rows.T[::-1]))
    rows, kinds = rows[order], kinds[order]
    kept = [
        place
        for place in range(len(order))
        if not ((rows[:place] <= rows[place]).all(1) & fewer[kinds[:place], kinds[place]]).any()
    ]
    return found.only(np.sort(fitting[order[kept]]).tolist())


def groups_of(problem: Problem) -> list[list[int]]:
    """Item numbers that share their options, in order of appearance."""
    groups: dict[int, list[int]] = {}
    for number, item in enumerate(problem.items):
        groups.setdefault(id(item.options), []).append(number)
    return list(groups.values())


def floor_of(sizes: Sequence[int], found: Sequence[Figures], capacity: float) -> Array:
    """`[P]` seconds that the slowest rank of each phase has in every solution: every item at its least mean.

    Args:
        sizes: items of each group.
        found: the figures of each group's options.
    """
    floor = np.zeros(found[0].mean.shape[1] if found else 0)
    for size, lines in zip(sizes, found, strict=True):
        allowed = lines.fitting(capacity)
        if allowed.any():
            floor += size * lines.mean[allowed].min(0)
    return floor
