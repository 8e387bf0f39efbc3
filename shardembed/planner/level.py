"""Deals out the pool of divisible items so that ranks come level: a linear program over the amounts of each on each rank.

Items that share their options are dealt out as one lump and cut at the ranks' borders afterwards, so that most of them stay whole.
Ranks that carry the same are one class.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sparse
from scipy.optimize import linprog

from shardembed.planner.problem import Array, Choice, Option
from shardembed.planner.state import State

VARIABLES = 12_000  # of the program; what is left over is dealt out beforehand, smallest items first
ALIKE = 1e-9  # relative


def level(state: State, seconds: float) -> State | None:
    """The state with an empty pool; None where memory does not allow it. All else stays as it is."""
    state = state.copy()
    lumps = _lumps(state)
    most = max(1, VARIABLES // len(_classes(state)[0]))
    for lump in lumps[most:][::-1]:
        if not all(_whole_or_even(state, item) for item in lump):
            return None
    lumps = lumps[:most]
    if not lumps:
        return state
    options = [state.option(lump[0]) for lump in lumps]
    amounts = _program(state, options, [len(lump) for lump in lumps], seconds)
    if amounts is None:
        return None
    for lump, option, amount_R in zip(lumps, options, amounts, strict=True):
        for item, choice in zip(lump, _cut(amount_R, len(lump), option.divisible), strict=True):
            _settle(state, item, choice)
    return state


def value(state: State, seconds: float) -> float:
    """Seconds of a step once the pool has been dealt out, save for rounding; inf where that cannot be."""
    lumps = _lumps(state)
    if not lumps:
        return state.value
    found = _solve(state, [state.option(lump[0]) for lump in lumps], [len(lump) for lump in lumps], seconds)
    return np.inf if found is None else found[0]


def _lumps(state: State) -> list[list[int]]:
    """Pooled items by option, those with most to deal out first."""
    found: dict[int, list[int]] = {}
    for item in state.pooled:
        found.setdefault(id(state.option(item)), []).append(item)

    def weight(lump: list[int]) -> float:
        return len(lump) * float((state.option(lump[0]).total / state.scale).sum())

    return sorted(found.values(), key=lambda lump: (-weight(lump), lump[0]))


def _settle(state: State, item: int, choice: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    before = state.choices[item]
    assert before is not None
    state.remove(item)
    state.restore(item, Choice(before.option, *choice))


def _whole_or_even(state: State, item: int) -> bool:
    """Put an item on as few ranks as do not raise the state's value, or on all of them."""
    option, before, ranks = state.option(item), state.value, state.problem.ranks
    spread = 1
    while True:
        spread = min(spread, ranks, option.divisible)
        parts = tuple(option.divisible // spread + (part < option.divisible % spread) for part in range(spread))
        peak = np.maximum(state.loads.max(0), state.mean)
        cost = state.cost(option.total / spread, float(option.memory[0]) * parts[0] / option.divisible, peak)
        best = np.argsort(cost, kind="stable")[:spread]
        fits = bool(np.isfinite(cost[best[-1]]))
        if fits:
            _settle(state, item, (tuple(best.tolist()), parts))
            if state.value <= before * (1 + 1e-7) or spread == min(ranks, option.divisible):
                return True
            _settle(state, item, ((), ()))
        elif spread == min(ranks, option.divisible):
            return False
        spread *= 4


def _classes(state: State) -> tuple[Array, Array]:
    """A rank of each class of ranks that carry the same, and the class of every rank."""
    carried = np.column_stack([state.loads / state.scale, state.memory / state.problem.capacity])
    _, first, inverse = np.unique(np.round(carried / ALIKE), axis=0, return_index=True, return_inverse=True)
    return first, inverse.reshape(-1)


def _program(state: State, options: list[Option], counts: list[int], seconds: float) -> list[Array] | None:
    """Items' worth of each lump on each rank, `[R]` a lump."""
    found = _solve(state, options, counts, seconds)
    return None if found is None else found[1]


def _solve(state: State, options: list[Option], counts: list[int], seconds: float) -> tuple[float, list[Array]] | None:
    """Minimise the sum over phases of the slowest rank. Variables: amounts, lump by lump and class by class, then Z."""
    first, class_of = _classes(state)
    sizes = np.bincount(class_of).astype(np.float64)
    loads, classes, lumps = state.loads[first], len(first), len(options)
    totals = np.array([option.total for option in options])
    busy = np.flatnonzero((totals.sum(0) > 0) | (loads.max(0) > 0))
    unit = max(float(state.mean.sum()), 1e-30)
    held = np.array([float(option.memory[0]) for option in options]) / state.problem.capacity
    # Rounding to whole parts may add one part of each lump to a rank.
    spare = 1e-9 + sum(size / option.divisible for size, option in zip(held, options, strict=True))
    free = 1.0 - spare - (state.memory[first] + state.alike_memory) / state.problem.capacity
    each = sparse.diags_array(1.0 / sizes)
    blocks: list[list[object]] = []
    limits: list[Array] = []
    for index, phase in enumerate(busy):
        z = sparse.csr_array((np.full(classes, -1.0), (np.arange(classes), np.full(classes, index))), shape=(classes, len(busy)))
        blocks.append([*(each * (totals[lump, phase] / unit) for lump in range(lumps)), z])
        limits.append(-loads[:, phase] / unit)
    blocks.append([*(each * size for size in held), sparse.csr_array((classes, len(busy)))])
    limits.append(np.maximum(free, 0.0))
    sums = sparse.hstack(
        [sparse.kron(sparse.eye_array(lumps), np.ones((1, classes))), sparse.csr_array((lumps, len(busy)))], format="csr"
    )
    cost = np.concatenate([np.zeros(lumps * classes), np.ones(len(busy))])
    answer = linprog(
        cost,
        sparse.block_array(blocks, format="csr"),
        np.concatenate(limits),
        sums,
        np.asarray(counts, dtype=np.float64),
        method="highs",
        options={"time_limit": seconds},
    )
    if answer.x is None:
        return None
    amounts = np.clip(answer.x[: lumps * classes].reshape(lumps, classes), 0.0, None) / sizes
    return float(answer.fun) * unit + state.alike, [amount[class_of] for amount in amounts]


def _cut(amount_R: Array, items: int, parts: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Lay `items` equal items end to end and cut them at the ranks' borders: (ranks, parts on each) of every item."""
    ends = np.cumsum(amount_R) * (items / amount_R.sum())
    borders = np.rint(ends * parts).astype(np.int64)
    borders[-1] = items * parts
    cut = []
    for item in range(items):
        first, stop = item * parts, (item + 1) * parts
        low, high = np.searchsorted(borders, [first, stop - 1], side="right")
        edges = np.concatenate([[first], borders[low:high], [stop]])
        shares = np.diff(edges)
        kept = np.flatnonzero(shares)
        cut.append((tuple((kept + low).tolist()), tuple(shares[kept].tolist())))
    return cut
