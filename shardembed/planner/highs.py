"""HiGHS behind one door: limits in work, not in time, and no number called a bound before it has been checked here.

A program is: minimise cost @ x with low <= matrix @ x <= high and 0 <= x <= upper, x whole where `whole`. What bounds a program
whose x need not be whole is counted here from the solver's multipliers, by weak duality: any multipliers of the right sign give a
bound, so a solver that is wrong can only give a poor one. A bound from branching cannot be counted again without its tree. It is
believed as far as nothing contradicts it: it must be finite, and not above what a point costs that keeps to the program.

How far HiGHS branches is counted in nodes, and how far it pivots in iterations, so that a program has the same answer on any
machine, idle or busy. `Effort.until` is a wish to stop early; an answer says whether it did.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sparse
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from shardembed.planner.problem import Array, Numbers

INFEASIBLE = 2  # status of scipy.optimize.milp and linprog
TOLERANCE = 1e-5  # that a point may be off by, in a constraint of figures near 1; HiGHS itself allows 1e-6
ROUNDING = 1e-12  # relative, of a sum of floats
MOST_NODES, WORK_A_NODE = 20_000, 20  # passes over the matrix, that a node of branch and bound is taken for


@dataclass(frozen=True)
class Effort:
    """How hard to look for a plan and a bound.

    Attributes:
        rounds: of the search, at most.
        looks: of the search, at a rank for a part, at most; more is not begun.
        work: entries of a program's matrix that branching may look at, a node of it being taken for `WORK_A_NODE` passes over them;
            the first node is always done, unless this is 0.
        near: how far (relative) a bound may be from the best that branching proves.
        iterations: of one linear program.
        until: a time of `time.monotonic`, after which to stop with what there is.
    """

    rounds: int = 800
    looks: float = 1e7
    work: float = 1e9
    near: float = 5e-4
    iterations: int = 20_000
    until: float = np.inf

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until


PLAN = Effort()  # for a plan that is asked for
BRIEF = Effort(rounds=150, looks=5e6, work=1e8, near=2e-3)  # where several are
WAITED_FOR = Effort(rounds=150, looks=5e6, work=0.0)  # where ranks wait for it, and nobody for its bound
TRIAL = Effort(rounds=0, work=1e8, near=2e-3)  # whether there is a plan at all


@dataclass(frozen=True, eq=False)
class Program:
    """The least cost of x with low <= matrix x <= high and 0 <= x <= upper.

    Attributes:
        cost: `[n]`.
        matrix: `[m, n]`, sparse.
        low: `[m]`.
        high: `[m]`.
        upper: `[n]`.
        whole: bool `[n]`, which of x are whole numbers.
    """

    cost: Array
    matrix: sparse.csr_array
    low: Array
    high: Array
    upper: Array
    whole: NDArray[np.bool_]

    def allows(self, values: Array) -> bool:
        """Whether a point keeps to the program, counted here."""
        rows = self.matrix @ values
        off = max(float((self.low - rows).max(initial=0.0)), float((rows - self.high).max(initial=0.0)))
        off = max(off, float((-values).max(initial=0.0)), float((values - self.upper).max(initial=0.0)))
        return off <= TOLERANCE and bool((np.abs(values - np.rint(values))[self.whole] <= TOLERANCE).all())


@dataclass(frozen=True, eq=False)
class Answer:
    """What HiGHS found, as far as it has been checked.

    Attributes:
        values: a point that keeps to the program, `[n]`; None where none was found.
        bound: what no point costs less than; None where nothing is proved.
        impossible: HiGHS says that there is no point.
        stopped: by the clock.
    """

    values: Array | None
    bound: float | None
    impossible: bool = False
    stopped: bool = False


def branched(program: Program, effort: Effort, near: float) -> Answer:
    """The program by branch and bound, until cost and bound are within `near` of each other (relative), or all work is done."""
    options: dict[str, Any] = {"mip_rel_gap": near, "node_limit": _nodes(program, effort), **_clock(effort)}
    # Arrays are what these take, whatever the stubs say.
    constraint = LinearConstraint(program.matrix, program.low, program.high)  # pyright: ignore[reportArgumentType]
    bounds = Bounds(np.zeros(len(program.upper)), program.upper)  # pyright: ignore[reportArgumentType]
    found = milp(program.cost, constraints=constraint, integrality=program.whole.astype(float), bounds=bounds, options=options)
    values = _point(program, found.x)
    return Answer(values, _believed(program, found.mip_dual_bound, values), found.status == INFEASIBLE, effort.over)


def relaxed(program: Program, effort: Effort) -> Answer:
    """The program without the demand for whole numbers; its bound holds for the program too, and is counted here."""
    matrix, low, high = program.matrix, program.low, program.high
    equal = np.flatnonzero(low == high)
    over, under = (np.flatnonzero(np.isfinite(side) & (low != high)) for side in (high, low))
    found = linprog(
        program.cost,
        sparse.vstack([matrix[over], -matrix[under]]),
        np.concatenate([high[over], -low[under]]),
        matrix[equal],
        low[equal],
        bounds=np.column_stack([np.zeros(len(program.upper)), program.upper]),
        method="highs",
        options={"maxiter": max(effort.iterations, 10 * len(low)), **_clock(effort)},
    )
    if found.x is None or found.status != 0:
        return Answer(None, None, found.status == INFEASIBLE, effort.over)
    multipliers = np.zeros(len(low))
    multipliers[equal] = found.eqlin.marginals
    multipliers[over] = np.minimum(found.ineqlin.marginals[: len(over)], 0.0)
    multipliers[under] -= np.minimum(found.ineqlin.marginals[len(over) :], 0.0)
    return Answer(np.asarray(found.x), dual(program, multipliers), False, effort.over)


def dual(program: Program, multipliers: Array) -> float | None:
    """What no point costs less than, by weak duality; None where the multipliers prove nothing.

    multipliers: `[m]`, of the constraints; below 0 for their `high`, above for their `low`.
    """
    pulled = program.matrix.T @ multipliers
    free = np.flatnonzero(np.isinf(program.upper))
    steep = free[pulled[free] > program.cost[free]]
    if len(steep):  # such a variable would make the bound infinitely low; smaller multipliers are as good as any
        if (program.cost[steep] <= 0).any():
            return None
        scale = float((program.cost[steep] / pulled[steep]).min()) * (1 - ROUNDING)
        multipliers, pulled = multipliers * scale, pulled * scale
    rows = _products(multipliers, np.where(multipliers > 0, program.low, program.high))
    columns = _products(np.minimum(program.cost - pulled, 0.0), program.upper)
    columns[free] = 0.0
    value = float(rows.sum() + columns.sum() - ROUNDING * (np.abs(rows).sum() + np.abs(columns).sum()))
    return value if np.isfinite(value) else None


def _products(factors: Array, values: Array) -> Array:
    """Where nothing times infinity is nothing."""
    return np.where(factors == 0, 0.0, factors * np.where(factors == 0, 0.0, values))


def _nodes(program: Program, effort: Effort) -> int:
    return int(np.clip(effort.work / (WORK_A_NODE * max(program.matrix.nnz, 1)), 1, MOST_NODES))


def _clock(effort: Effort) -> dict[str, float]:
    return {} if np.isinf(effort.until) else {"time_limit": max(effort.until - time.monotonic(), 0.01)}


def _point(program: Program, values: Array | None) -> Array | None:
    return values if values is not None and np.isfinite(values).all() and program.allows(values) else None


def _believed(program: Program, bound: float | None, values: Array | None) -> float | None:
    if bound is None or not np.isfinite(bound):
        return None
    if values is None:
        return float(bound)
    cost = float(program.cost @ values)
    return float(bound) if bound <= cost + TOLERANCE * max(1.0, abs(cost)) else None


class Rows:
    """Constraints low <= row @ variables <= high, collected entry by entry."""

    def __init__(self) -> None:
        self._low: list[float] = []
        self._high: list[float] = []
        self._entries: list[tuple[Numbers, Array]] = []

    def add(self, variables: ArrayLike, factors: ArrayLike, low: float, high: float) -> None:
        self._entries.append((np.asarray(variables, dtype=np.intp), np.asarray(factors, dtype=np.float64)))
        self._low.append(low)
        self._high.append(high)

    def program(self, cost: Array, upper: Array, whole: NDArray[np.bool_]) -> Program:
        row = np.repeat(np.arange(len(self._entries)), [len(variables) for variables, _ in self._entries])
        variables, factors = (np.concatenate(column) for column in zip(*self._entries, strict=True))
        matrix = sparse.csr_array((factors, (row, variables)), shape=(len(self._entries), len(cost)))
        return Program(cost, matrix, np.array(self._low), np.array(self._high), upper, whole)
