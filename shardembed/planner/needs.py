"""The least memory that the tables of a problem need on a rank, whatever the plan: each line is a proof that less is not enough.

    table   some rank holds the largest part of an item's smallest option
    crowd   of more than k x R items, k + 1 have their largest parts on one rank
    rank    a rank holds what is pinned to it, and what every rank holds of the others
    total   a rank holds at least the mean of all, each item by the smallest of its options that fit at all

A capacity that passes all four may still be too little, because parts are whole (see `packed`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shardembed.planner.problem import Array, Item, Option, Problem
from shardembed.planner.relax import Figures, figures, groups_of
from shardembed.planner.space import Space

CROWDS = 64  # largest k looked at: beyond it, the total says nearly as much


@dataclass(frozen=True)
class Need:
    """Why no plan fits into less memory than so much.

    Attributes:
        kind: of reason; see the module.
        least: bytes of a rank, below which no plan fits.
        items: numbers of those that make it so, the largest first.
        bytes: that each of the items adds.
        rank: which one, of kind "rank".
        each: items that a rank can hold, of kind "crowd".
    """

    kind: str
    least: float
    items: tuple[int, ...]
    bytes: tuple[float, ...]
    rank: int = 0
    each: int = 0


def needs(problem: Problem) -> list[Need]:
    """All four, in the order above."""
    groups = groups_of(problem)
    found = [figures(problem.items[group[0]].options, problem.ranks) for group in groups]
    crowds = _crowds(groups, found, problem.ranks)
    table = crowds[0]
    rank = _fullest(problem, groups)
    floor = max(need.least for need in (*crowds, rank))
    return [table, max(crowds, key=lambda need: need.least), rank, _total(problem, groups, found, floor)]


def needed(problem: Problem) -> float:
    """Bytes of a rank below which no plan fits."""
    return max(need.least for need in needs(problem))


def whole(space: Space, problem: Problem) -> Problem:
    """The problem with the options that were left out because others are as good in seconds: in bytes they may be better."""
    items = list(problem.items)
    for group in groups_of(problem):
        options = space.options(group[0])
        for number in group:
            items[number] = Item(items[number].name, options)
    return replace(problem, items=tuple(items))


def smallest(options: Sequence[Option], ranks: int) -> Option:
    """The option whose largest part is smallest, for messages."""
    found = figures(tuple(options), ranks)
    return options[int(found.option[found.least.argmin()])]


def _crowds(groups: list[list[int]], found: list[Figures], ranks: int) -> list[Need]:
    """One for every k from 0 on; with k = 0, the item that is largest by itself."""
    least = [float(figure.least.min()) for figure in found]
    order = sorted(range(len(groups)), key=lambda group: -least[group])
    items = [item for group in order for item in groups[group]]
    sizes = [least[group] for group in order for _ in groups[group]]
    return [
        Need(
            "crowd" if k else "table",
            (k + 1) * sizes[k * ranks],
            tuple(items[: k * ranks + 1]),
            tuple(sizes[: k * ranks + 1]),
            each=k,
        )
        for k in range(min(CROWDS, (len(items) - 1) // ranks) + 1)
    ]


def _fullest(problem: Problem, groups: list[list[int]]) -> Need:
    certain = [np.min([_certain(option, problem.ranks) for option in problem.items[group[0]].options], axis=0) for group in groups]
    held = sum((len(group) * line for group, line in zip(groups, certain, strict=True)), np.zeros(problem.ranks))
    rank = int(held.argmax())
    sizes = {item: float(line[rank]) for group, line in zip(groups, certain, strict=True) for item in group if line[rank] > 0}
    items = sorted(sizes, key=lambda item: (-sizes[item], item))
    return Need("rank", float(held[rank]), tuple(items), tuple(sizes[item] for item in items), rank=rank)


def _certain(option: Option, ranks: int) -> Array:
    """`[R]` bytes that an option puts on each rank wherever its other parts lie."""
    held = np.full(ranks, option.common_memory)
    if option.ranks is not None:
        np.add.at(held, np.asarray(option.ranks, dtype=np.intp), option.memory)
    elif not option.divisible and option.sharing is None and option.parts == ranks:
        held += option.memory.min()
    return held


def together(problem: Problem, capacity: float) -> Need:
    """The mean of all items by the smallest of their options that fit into `capacity`; no plan with that capacity needs less."""
    groups = groups_of(problem)
    found = [figures(problem.items[group[0]].options, problem.ranks) for group in groups]
    sizes = _means(found, capacity)
    order = sorted(range(len(groups)), key=lambda group: -sizes[group])
    items = tuple(item for group in order for item in groups[group])
    bytes_ = tuple(float(sizes[group]) for group in order for _ in groups[group])
    return Need("total", sum(bytes_), items, bytes_)


def _means(found: list[Figures], capacity: float) -> Array:
    """`[groups]`; inf where nothing fits."""
    return np.array([figure.memory[figure.least <= capacity].min(initial=np.inf) for figure in found])


def _total(problem: Problem, groups: list[list[int]], found: list[Figures], floor: float) -> Need:
    """The smallest capacity, `floor` at least, that holds the mean of all items by options that fit into it."""
    counts = np.array([len(group) for group in groups])
    low, high = floor, float(counts @ _means(found, floor))
    if high <= floor:
        return together(problem, floor)
    # Bisection: more capacity lets smaller options in, so the mean that is needed falls while it grows. 60 halvings end in the last
    # digits of a float.
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if counts @ _means(found, middle) <= middle else (middle, high)
    return replace(together(problem, high), least=high)
