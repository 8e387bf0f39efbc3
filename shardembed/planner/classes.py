"""Ranks that carry the same, or nearly the same, as one class: a program over classes is small however many ranks there are.

What a class gets of everything is then dealt out among its ranks in one mixture, to each so much that they end level. Legend: R
ranks, K classes, F figures (seconds of each phase, and bytes as a share of what a rank can hold).
"""

from __future__ import annotations

import numpy as np

from shardembed.planner.problem import Array, Numbers
from shardembed.planner.state import State

ALIKE = 1e-9  # relative
NEARLY = 1e-3  # of a rank's seconds, or of its memory: how far ranks of a class differ at first; then twice as much, and so on
HALVINGS = 50  # of an interval, to find a number


def classes_of(state: State, sharing: list[int], most: int) -> tuple[Numbers, Numbers]:
    """A rank of each class and the class of every rank `[R]`; at most `most` classes, save that ranks are told apart by which items
    of `sharing` lie there.
    """
    held = np.zeros((state.problem.ranks, len(sharing)))
    for column, item in enumerate(sharing):
        choice = state.choices[item]
        assert choice is not None
        held[list(choice.ranks), column] = 1.0
    memory = state.memory[:, None] / state.problem.capacity
    first, class_of = _told_apart(np.column_stack([state.loads / state.scale, memory]) / ALIKE, held)
    fewest = len(first) if len(first) <= most else len(_told_apart(held, held)[0])
    carried = np.column_stack([state.loads / state.scale.sum(), memory])
    step = NEARLY
    while len(first) > max(most, fewest) and step < 1.0:
        first, class_of = _told_apart(carried / step, held)
        step *= 2
    return first, class_of


def _told_apart(carried: Array, held: Array) -> tuple[Numbers, Numbers]:
    numbers = np.round(np.column_stack([carried, held]))
    _, first, inverse = np.unique(numbers, axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def means(figures: Array, class_of: Numbers) -> Array:
    """`[K, F]` of `[R, F]`."""
    sums = np.zeros((int(class_of.max()) + 1, figures.shape[1]))
    np.add.at(sums, class_of, figures)
    return sums / np.bincount(class_of)[:, None]


def within(base_RF: Array, mixture_KF: Array, limit_F: Array, class_of: Numbers) -> Array:
    """How much of its class's mixture each rank gets, `[R]` with a mean of 1 in each class: so much that in each of them the ranks
    pass the limits by one and the same, or stay as far below.

    Args:
        base_RF: what ranks carry already, in units in which one more costs the same in every figure.
        mixture_KF: what a rank of each class gets of everything, on average.
        limit_F: what a rank may come to.
    """
    sizes = np.bincount(class_of).astype(np.float64)
    mixture = np.where(mixture_KF > 0, mixture_KF, np.inf)[class_of]

    def shares(over_K: Array) -> Array:
        room = (limit_F + over_K[class_of, None] - base_RF) / mixture
        return np.clip(np.where(np.isfinite(mixture), room, np.inf).min(1), 0.0, sizes[class_of])

    span = float(np.abs(limit_F).sum() + np.abs(base_RF).max(initial=0.0) + (mixture_KF * sizes[:, None]).max(initial=0.0))
    low, high = np.full(len(sizes), -span), np.full(len(sizes), span)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        enough = np.bincount(class_of, shares(middle)) >= sizes
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    found = shares(high)
    return found * (sizes / np.maximum(np.bincount(class_of, found), 1e-30))[class_of]
