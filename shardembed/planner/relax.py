"""What a lower bound may know of an option: the figures that hold wherever its parts are put.

For any solution, with Z[p] the slowest rank's seconds of phase p without what all ranks do alike:

    Z[p] >= sum over items of total[p] / R                 the mean is no more than the slowest
    Z[p] >= largest[p] of every chosen option              some rank holds the largest part
    R x capacity >= sum over items of memory               and no rank holds more than it can
"""

from __future__ import annotations

import itertools
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
        return self.least <= capacity * (1 + 1e-9)

    def only(self, kept: Sequence[int]) -> Figures:
        index = np.asarray(kept, dtype=np.intp)
        charges = tuple(self.charges[number] for number in kept)
        columns = (self.common, self.mean, self.largest, self.memory, self.least)
        return Figures(self.option[index], charges, *(column[index] for column in columns))


Line = tuple[int, frozenset[str], float, Array, Array, float, float]


def figures(options: tuple[Option, ...], ranks: int) -> Figures:
    """One line an option; options with `sharing` stand for every way to share, by the largest share, an interval a line."""
    lines: list[Line] = []
    shared: dict[int, list[int]] = {}
    for number, option in enumerate(options):
        if option.sharing is None:
            lines.append(_line(number, option, ranks))
        else:
            shared.setdefault(id(option.sharing), []).append(number)
    for numbers in shared.values():
        lines += _shared(numbers, options, ranks)
    number, charges, common, mean, largest, memory, least = zip(*lines, strict=True)
    columns = (np.array(column) for column in (common, mean, largest, memory, least))
    return Figures(np.array(number, dtype=np.intp), charges, *columns)


def _line(number: int, option: Option, ranks: int) -> Line:
    phases = option.common.shape[0]
    common, held = float(option.common.sum()), option.common_memory
    if not option.parts:
        return number, option.charges, common, np.zeros(phases), np.zeros(phases), held, held
    if option.divisible:  # some rank holds at least one part, and at least the mean
        fewest = min(option.divisible, ranks)
        largest, most = option.total / fewest, float(option.memory[0]) / fewest
    elif option.cuttable:  # so that the mean is all that is known
        largest, most = option.total / ranks, float(option.memory.sum()) / ranks
    else:
        largest, most = option.loads.max(0), float(option.memory.max())
    mean, memory = option.total / ranks, float(option.memory.sum()) / ranks
    return number, option.charges, common, mean, largest, memory + held, most + held


def _shared(numbers: list[int], options: tuple[Option, ...], ranks: int) -> list[Line]:
    """With q the largest share, low <= q <= high: the largest part has loads of at least those of `low`. And since g is concave and
    every share is q at most, each has g(p) >= p g(high) / high answers, so all together have g(high) / high at least.
    """
    first = options[numbers[0]]
    sharing = first.sharing
    assert sharing is not None
    counts = np.array([options[number].parts for number in numbers])
    octaves = np.log2(ranks)
    edges = 2.0 ** -np.linspace(octaves, 0.0, max(2, int(np.ceil(octaves * INTERVALS)) + 1))
    lines: list[Line] = []
    for low, high in itertools.pairwise(edges):
        answers = float(sharing.answers(np.array([high]))[0] / high)
        more = answers - first.parts * float(sharing.answers(np.array([1.0 / first.parts]))[0])
        common = float(first.common.sum()) + more * float(sharing.common_answer.sum())
        held = first.common_memory + more * sharing.memory_common
        mean = (sharing.linear + answers * sharing.answer) / ranks
        memory = (sharing.memory_linear + answers * sharing.memory_answer) / ranks
        part = np.array([low])
        largest, most = sharing.loads(part)[0], float(sharing.memory(part)[0])
        near = numbers[int(np.abs(np.log(counts * np.sqrt(low * high))).argmin())]
        lines.append((near, first.charges, common, mean, largest, memory + held, most + held))
    return lines


def undominated(found: Figures, capacity: float, floor: Array) -> Figures:
    """The lines that a bound has to consider: those that fit, without those that another one is no worse than in every figure.

    floor: `[P]`, seconds that every solution's slowest rank has anyway; a largest part below it says nothing.
    """
    rows = np.column_stack([found.common, found.mean, np.maximum(found.largest, floor), found.memory])
    fitting = np.flatnonzero(found.fitting(capacity))
    kept: list[int] = []
    for index in sorted(fitting.tolist(), key=lambda i: (*rows[i], len(found.charges[i]), i)):
        worse = (rows[kept] <= rows[index]).all(1) if kept else np.zeros(0, dtype=bool)
        if not any(found.charges[kept[other]] <= found.charges[index] for other in np.flatnonzero(worse)):
            kept.append(index)
    return found.only(sorted(kept))


def groups_of(problem: Problem) -> list[list[int]]:
    """Item numbers that share their options, in order of appearance."""
    groups: dict[int, list[int]] = {}
    for number, item in enumerate(problem.items):
        groups.setdefault(id(item.options), []).append(number)
    return list(groups.values())


def floor_of(problem: Problem) -> Array:
    """`[P]` seconds that the slowest rank of each phase has in every solution: every item at its least mean."""
    floor = np.zeros(len(problem.phases))
    for group in groups_of(problem):
        found = figures(problem.items[group[0]].options, problem.ranks)
        allowed = found.fitting(problem.capacity)
        if allowed.any():
            floor += len(group) * found.mean[allowed].min(0)
    return floor
