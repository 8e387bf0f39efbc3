"""Cuts that nothing lists, for what the relaxation chose: an option that stands for finer cuts (`Option.cuttable`) may be more than
a rank can carry, and then some of those are what a plan needs.
"""

from __future__ import annotations

from dataclasses import replace

from shardembed.planner.bound import Bound
from shardembed.planner.problem import Array, Item, Option, Problem
from shardembed.planner.relax import groups_of

SIZES = (1.0, 0.5, 0.25)  # of what a rank has, that parts should not pass
MOST = 64  # blocks


def with_finer(problem: Problem, bound: Bound) -> tuple[Problem, dict[int, list[int]]]:
    """The problem with finer cuts of chosen options that are too large, behind the options that items have already, and by item the
    numbers of those that came. No solution of it is faster than the bound, which knows all of them by the option they are cuts of.
    """
    if problem.finer is None:
        return problem, {}
    items, more = list(problem.items), {}
    for group in groups_of(problem):
        options = problem.items[group[0]].options
        chosen = sorted({bound.options[item] for item in group})
        found = [cut for number in chosen for cut in _cuts(problem, group[0], number, bound.targets)]
        if not found:
            continue
        extended = (*options, *found)
        for item in group:
            items[item] = Item(items[item].name, extended)
            more[item] = list(range(len(options), len(extended)))
    return replace(problem, items=tuple(items)), more


def _cuts(problem: Problem, item: int, number: int, targets: Array) -> list[Option]:
    option = problem.items[item].options[number]
    if not option.cuttable or problem.finer is None:
        return []
    whole = size_of(option, targets, problem.capacity)
    wanted = dict.fromkeys(_blocks(whole / size) for size in SIZES)
    return [cut for blocks in wanted if blocks > 1 for cut in problem.finer(item, number, blocks)]


def _blocks(times: float) -> int:
    """The power of two from `times` on."""
    blocks = 1
    while blocks < min(times, MOST):
        blocks *= 2
    return blocks


def size_of(option: Option, targets: Array, capacity: float) -> float:
    """Seconds and bytes of an option's largest part, as a share of what a rank is to have: the largest of these shares."""
    scale = targets.clip(targets.sum() * 1e-6 + 1e-30)
    return max(float((option.largest / scale).max()), option.most / capacity) if option.parts else 0.0
