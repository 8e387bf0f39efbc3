"""A lower bound on the step time of every plan of the space, proved by a mixed-integer relaxation that HiGHS solves.

The relaxation (see `relax.py`) chooses an option for every item and forgets on which ranks its parts lie. Items that share their
options are one group with a number of items, so many equal tables cost no more than one. Its optimum, or the solver's own
dual bound where time runs out, is below every solution of the problem; a small margin covers the solver's tolerances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sparse
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from shardembed.planner.problem import Array, Numbers, Problem
from shardembed.planner.relax import figures, floor_of, groups_of, undominated

MARGIN = 1e-5  # HiGHS lets a constraint or an integer be off by 1e-6; every constraint here is scaled to coefficients of 1
MOST_COLUMNS = 10_000  # of a relaxation in whole numbers
INFEASIBLE = 2  # status of scipy.optimize.milp
PRECISION = 2e-4  # relative; no more is asked of the solver


@dataclass(frozen=True)
class Bound:
    """value: seconds that no solution beats. options: of every item, as the relaxation would have it. targets: `[P]`, Z."""

    value: float
    options: tuple[int, ...]
    targets: Array


@dataclass(frozen=True)
class _Columns:
    """What the relaxation chooses from: options of groups, `[n]` each. group, option: numbers. count: items of the group."""

    group: Numbers
    option: Numbers
    count: Array
    common: Array
    mean: Array
    largest: Array
    memory: Array
    charges: list[frozenset[str]]


def lower_bound(problem: Problem, seconds: float) -> Bound | None:
    """The bound, or None where the relaxation has no solution: then the problem has none."""
    groups = groups_of(problem)
    columns = _columns(problem, groups)
    if columns is None:
        return None
    names = sorted({name for charges in columns.charges for name in charges})
    base = 0.0 if problem.base is None else float(problem.base.sum())
    found = _solve(problem, columns, names, len(groups), seconds)
    if found is None:
        return None
    value, amounts, targets = found
    options = _deal(columns, amounts, groups, len(problem.items))
    return Bound((value + base) * (1 - MARGIN), options, targets)


def _columns(problem: Problem, groups: list[list[int]]) -> _Columns | None:
    floor = floor_of(problem)
    parts: list[tuple[NDArray[Any], ...]] = []
    charges: list[frozenset[str]] = []
    for number, group in enumerate(groups):
        found = undominated(figures(problem.items[group[0]].options, problem.ranks), problem.capacity, floor)
        if not len(found.option):
            return None
        size = np.ones(len(found.option))
        # A part below the floor says nothing: left out, it costs the solver no row.
        largest = np.where(found.largest > floor * (1 + 1e-9), found.largest, 0.0)
        parts.append((number * size, found.option, len(group) * size, found.common, found.mean, largest, found.memory))
        charges += found.charges
    joined = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return _Columns(joined[0].astype(np.intp), joined[1], *joined[2:], charges=charges)


def _solve(problem: Problem, columns: _Columns, names: list[str], groups: int, seconds: float) -> tuple[float, Array, Array] | None:
    """(dual bound, amount of each column, Z). Variables: amounts x, whether used u, charges y, Z.

    A column of a group of one is its own u.
    """
    n, phases = len(columns.group), len(problem.phases)
    many = np.flatnonzero(columns.count > 1)
    used = np.arange(n)
    used[many] = n + np.arange(len(many))
    first_y = n + len(many)
    first_z = first_y + len(names)
    size = first_z + phases
    # Seconds of Z's unit: no more than the answer and near it, so that the solver's absolute tolerances are small against it.
    cheapest = (columns.common + columns.mean.sum(1)) * columns.count
    unit = sum(float(cheapest[columns.group == group].min()) for group in range(groups)) or 1.0
    rows = Rows(size)
    everyone = np.arange(n)
    for group in range(groups):
        mine = everyone[columns.group == group]
        size_of = float(columns.count[mine[0]])
        rows.add(mine, np.ones(len(mine)), size_of, size_of)
    for phase in range(phases):
        if columns.mean[:, phase].any():
            rows.add(np.append(everyone, first_z + phase), np.append(-columns.mean[:, phase] / unit, 1.0), 0.0, np.inf)
    memory = [problem.charge_memory.get(name, 0.0) for name in names]
    ys = first_y + np.arange(len(names))
    rows.add(np.append(everyone, ys), np.append(columns.memory, memory) / problem.capacity, -np.inf, 1.0)
    for column in many:
        rows.add([column, used[column]], [1.0, -columns.count[column]], -np.inf, 0.0)
    # An item alone takes one option only, so that its options share a row, which is the tighter for it.
    lots = [everyone[columns.group == group] for group in range(groups)]
    lots = [lot for mine in lots for lot in ([mine] if columns.count[mine[0]] == 1 else [np.array([column]) for column in mine])]
    for lot in lots:
        for phase in np.flatnonzero(columns.largest[lot].any(0)):
            rows.add(np.append(used[lot], first_z + phase), np.append(-columns.largest[lot, phase] / unit, 1.0), 0.0, np.inf)
        for index, name in enumerate(names):
            using = [used[column] for column in lot if name in columns.charges[column]]
            if using:
                rows.add(np.array([first_y + index, *using]), np.append(1.0, -np.ones(len(using))), 0.0, np.inf)
    cost = np.zeros(size)
    cost[:n] = columns.common / unit
    cost[first_y:first_z] = [problem.charges[name].sum() / unit for name in names]
    cost[first_z:] = 1.0
    upper = np.concatenate([columns.count, np.ones(first_z - n), np.full(phases, np.inf)])
    # Thousands of items hardly notice that each takes one option, and the solver would not notice its time limit.
    whole = np.concatenate([np.full(first_z, float(n <= MOST_COLUMNS)), np.zeros(phases)])
    options = {"time_limit": seconds, "mip_rel_gap": PRECISION}
    answer = milp(cost, constraints=rows.constraint(), integrality=whole, bounds=_bounds(upper), options=options)
    if answer.status == INFEASIBLE:
        return None
    value = answer.mip_dual_bound if n <= MOST_COLUMNS else answer.fun
    if answer.x is None or value is None or not np.isfinite(value):  # out of time: drop the demand for whole numbers
        answer = milp(cost, constraints=rows.constraint(), bounds=_bounds(upper))
        if answer.status == INFEASIBLE:
            return None
        value = answer.fun
    return float(value) * unit, answer.x[:n], answer.x[first_z:] * unit


class Rows:
    """Constraints low <= row @ variables <= high, collected entry by entry."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._low: list[float] = []
        self._high: list[float] = []
        self._entries: list[tuple[Numbers, Array]] = []

    def add(self, variables: ArrayLike, factors: ArrayLike, low: float, high: float) -> None:
        self._entries.append((np.asarray(variables, dtype=np.intp), np.asarray(factors, dtype=np.float64)))
        self._low.append(low)
        self._high.append(high)

    def constraint(self) -> LinearConstraint:
        row = np.repeat(np.arange(len(self._entries)), [len(variables) for variables, _ in self._entries])
        variables, factors = (np.concatenate(column) for column in zip(*self._entries, strict=True))
        matrix = sparse.csr_array((factors, (row, variables)), shape=(len(self._entries), self._size))
        low, high = np.array(self._low), np.array(self._high)
        return LinearConstraint(matrix, low, high)  # pyright: ignore[reportArgumentType]  # arrays are what it takes


def _bounds(upper: Array) -> Bounds:
    return Bounds(np.zeros(len(upper)), upper)  # pyright: ignore[reportArgumentType]  # arrays are what it takes


def _deal(columns: _Columns, amounts: Array, groups: list[list[int]], items: int) -> tuple[int, ...]:
    """An option for every item, from the amounts of a group's options (rounded, where they are not whole)."""
    chosen = np.zeros(items, dtype=int)
    for number, group in enumerate(groups):
        mine = np.flatnonzero(columns.group == number)
        shares = np.maximum(amounts[mine], 0.0)
        counts = np.floor(shares + 1e-6).astype(int)
        while counts.sum() < len(group):
            counts[np.argmax(shares - counts)] += 1
        chosen[group] = np.repeat(columns.option[mine], counts)[: len(group)]
    return tuple(int(option) for option in chosen)
