"""What a lower bound may know of an option: the figures that hold wherever its parts are put.

For any solution, with Z[p] the slowest rank's seconds of phase p without what all ranks do alike:

    Z[p] >= sum over items of total[p] / R                 the mean is no more than the slowest
    Z[p] >= largest[p] of every chosen option              some rank holds the largest part
    R x capacity >= sum over items of memory               and no rank holds more than it can
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardembed.planner.problem import Array, Option, Problem


@dataclass(frozen=True)
class Figures:
    """Of n options of one item. common: `[n]` seconds, all phases together, on every rank. mean: `[n, P]` seconds of a rank if all
    were balanced. largest: `[n, P]` seconds of the largest part. memory: `[n]` bytes of a rank if all were balanced, least:
    `[n]` bytes that some rank must have at least.
    """

    common: Array
    mean: Array
    largest: Array
    memory: Array
    least: Array


def figures(options: tuple[Option, ...], ranks: int) -> Figures:
    rows = [_figures(option, ranks) for option in options]
    common, mean, largest, memory, least = (np.array(column) for column in zip(*rows, strict=True))
    return Figures(common, mean, largest, memory, least)


def _figures(option: Option, ranks: int) -> tuple[float, Array, Array, float, float]:
    phases = option.common.shape[0]
    if not option.parts:
        return option.common.sum(), np.zeros(phases), np.zeros(phases), option.common_memory, option.common_memory
    if option.divisible:  # some rank holds at least one part, and at least the mean
        fewest = min(option.divisible, ranks)
        largest, most = option.total / fewest, option.memory[0] / fewest
    else:
        largest, most = option.loads.max(0), option.memory.max()
    return (
        option.common.sum(),
        option.total / ranks,
        largest,
        option.memory.sum() / ranks + option.common_memory,
        most + option.common_memory,
    )


def undominated(options: tuple[Option, ...], ranks: int, capacity: float, floor: Array) -> list[int]:
    """The options that a bound has to consider: those that fit, without those that another one is no worse than in every figure.

    floor: `[P]`, seconds that every solution's slowest rank has anyway; a largest part below it says nothing.
    """
    found = figures(options, ranks)
    rows = np.column_stack([found.common, found.mean, np.maximum(found.largest, floor), found.memory])
    fitting = np.flatnonzero(found.least <= capacity)
    kept: list[int] = []
    for index in sorted(fitting, key=lambda i: (*rows[i], len(options[i].charges), i)):
        charges = options[index].charges
        if not any((rows[other] <= rows[index]).all() and options[other].charges <= charges for other in kept):
            kept.append(int(index))
    return sorted(kept)


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
        options = problem.items[group[0]].options
        fitting = figures(options, problem.ranks)
        allowed = fitting.least <= problem.capacity
        if allowed.any():
            floor += len(group) * fitting.mean[allowed].min(0)
    return floor
