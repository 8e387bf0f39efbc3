"""A stronger relaxation for few ranks: it also says on which rank every part lies, so it is nearly the problem itself.

Nearly: parts of one option that are almost equal count as equal, each as little as the least of them, and parts of one option
may meet on a rank. So its optimum is still below every solution, and what it proposes is mostly as good as it says.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardembed.planner.problem import Array, Choice, Option

ALIKE = 0.02  # relative difference of parts that count as equal
VARIABLES = 6000


@dataclass(frozen=True)
class Proposal:
    """value: seconds that no solution beats. choices: of every item; those of divisible options are without ranks."""

    value: float
    choices: tuple[Choice, ...] | None


@dataclass(frozen=True)
class _Kind:
    """Parts of an option that count as equal: which, and the least that each adds to a rank, `[P]` and bytes."""

    parts: Array
    loads: Array
    memory: float


def _kinds(option: Option) -> list[_Kind]:
    if not option.parts:
        return []
    weight = option.loads.sum(1) + 1e-12 * option.memory
    order = np.argsort(-weight, kind="stable")
    breaks = [0]
    for position in range(1, len(order)):
        if weight[order[position]] < weight[order[breaks[-1]]] * (1 - ALIKE):
            breaks.append(position)
    cuts = np.split(order, breaks[1:])
    return [_Kind(parts, option.loads[parts].min(0), float(option.memory[parts].min())) for parts in cuts]
