"""A lower bound on the step time of every plan of the space, proved by a mixed-integer relaxation that HiGHS solves.

The relaxation (see `relax.py`) chooses an option for every item and forgets on which ranks its parts lie. Items that share their
options are one group with a number of items, so many equal tables cost no more than one. What branching proves of it, or at least
what its linear program does, is below every solution of the problem; a small margin covers the solver's tolerances.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sparse

from shardembed.planner import highs
from shardembed.planner.highs import Effort, Program, Rows
from shardembed.planner.problem import Array, Numbers, Problem
from shardembed.planner.relax import Figures, figures, floor_of, groups_of, undominated

MARGIN = 1e-5  # HiGHS lets a constraint or an integer be off by 1e-6; every constraint here is scaled to coefficients of 1
MOST_ENTRIES = 40_000  # of the matrix of a relaxation in whole numbers
PAID = 0.5  # share of a fixed charge, from which on the linear program's answer is taken to pay all of it
PAID_ROUNDING = 1e-6  # of a charge that is not paid
DIGITS = 1e-9  # relative, that a bound and the solution it is of may differ by


@dataclass(frozen=True)
class Bound:
    """What no solution beats.

    Attributes:
        values: seconds that no solution beats; none where nothing is proved.
        options: of every item, as the relaxation would have it.
        targets: `[P]`, Z.
        lines: of every group of items (`relax.groups_of`), what it may choose from.
        stopped: the clock ended the work on it.
        relaxation: that it is of.
    """

    values: tuple[float, ...]
    options: tuple[int, ...]
    targets: Array
    lines: tuple[Figures, ...]
    stopped: bool
    relaxation: Relaxation

    @property
    def value(self) -> float | None:
        return max(self.values, default=None)

    def under(self, step: float) -> Bound:
        """Without what a solution of `step` seconds contradicts: that was no bound."""
        return replace(self, values=tuple(value for value in self.values if value <= step * (1 + DIGITS)))


@dataclass(frozen=True)
class _Columns:
    """What the relaxation chooses from: options of groups, each array `[n]` or `[n, P]` as in `Figures`.

    Attributes:
        group: its number.
        option: its number among the group's.
        count: items of the group.
        common: as in `Figures`.
        mean: as in `Figures`.
        largest: as in `Figures`, but 0 where it says nothing.
        memory: as in `Figures`.
        charges: names of the fixed charges that it uses.
    """

    group: Numbers
    option: Numbers
    count: Array
    common: Array
    mean: Array
    largest: Array
    memory: Array
    charges: list[frozenset[str]]


@dataclass(frozen=True)
class Relaxation:
    """The relaxation of a problem as a program, and the way back from the program's answers.

    Attributes:
        items: of the problem.
        groups: numbers of the items that share their options.
        lines: of every group, what it may choose from.
        columns: the same, one after the other.
        program: in units of `unit` seconds; its variables end with Z.
        unit: seconds.
        base: seconds that no choice changes.
        charges: places of their variables.
    """

    items: int
    groups: list[list[int]]
    lines: list[Figures]
    columns: _Columns
    program: Program
    unit: float
    base: float
    charges: slice

    @property
    def small(self) -> bool:
        """Whether branching gets anywhere: many items hardly notice that each takes one option, and its first node takes long."""
        return self.program.matrix.nnz <= MOST_ENTRIES

    @staticmethod
    def of(problem: Problem) -> Relaxation | None:
        """None where some item has no option that fits."""
        groups = groups_of(problem)
        lines, floor = _lines(problem, groups)
        if not all(len(found.option) for found in lines):
            return None
        columns = _columns(groups, lines, floor)
        names = sorted({name for charges in columns.charges for name in charges})
        program, unit = _program(problem, columns, names, len(groups))
        base = 0.0 if problem.base is None else float(problem.base.sum())
        end = len(program.cost) - len(problem.phases)
        return Relaxation(len(problem.items), groups, lines, columns, program, unit, base, slice(end - len(names), end))

    def bound(self, values: tuple[float, ...], answer: Array, stopped: bool) -> Bound:
        """With what an answer chooses."""
        options = _deal(self.columns, answer[: len(self.columns.group)], self.groups, self.items)
        return Bound(values, options, answer[self.charges.stop :] * self.unit, tuple(self.lines), stopped, self)

    def within(self, phase: int, low: float, high: float, effort: Effort) -> Bound | None:
        """What the linear program chooses where the slowest rank of a phase takes `low` to `high` seconds; None where it cannot.

        Its values are seconds that it takes, which prove nothing of plans in which the phase takes others.
        """
        program, place = self.program, self.charges.stop + phase
        upper = program.upper.copy()
        upper[: len(self.columns.group)][self.columns.largest[:, phase] > high] = 0.0
        row = sparse.csr_array(([1.0], ([0], [place])), shape=(1, len(program.cost)))
        held = replace(
            program,
            matrix=sparse.csr_array(sparse.vstack([program.matrix, row])),
            low=np.append(program.low, low / self.unit),
            high=np.append(program.high, high / self.unit),
            upper=upper,
        )
        found = highs.relaxed(held, effort)
        if found.values is None or found.bound is None:
            return None
        return self.bound((found.bound * self.unit + self.base,), found.values, found.stopped)


def lower_bound(problem: Problem, effort: Effort) -> Bound | None:
    """What is proved, or None where some item has no option that fits: then the problem has no solution."""
    relaxation = Relaxation.of(problem)
    if relaxation is None:
        return None
    program, columns = relaxation.program, relaxation.columns
    # The linear program first: its bound stands whatever becomes of branching.
    loose = highs.relaxed(program, effort)
    tight = highs.branched(program, effort, effort.near) if effort.work and relaxation.small else loose
    found = loose.values if tight.values is None else tight.values
    if not relaxation.small and found is not None:
        found = _charged(program, found, relaxation.charges, effort)
    proved = [value for value in (loose.bound, tight.bound) if value is not None]
    values = tuple((value * relaxation.unit + relaxation.base) * (1 - MARGIN) for value in proved)
    if found is None:  # what the search begins with need not be proved
        found = _cheapest(columns, len(program.cost), len(problem.phases), relaxation.unit)
    return relaxation.bound(values, found, loose.stopped or tight.stopped)


def _charged(program: Program, found: Array, charges: slice, effort: Effort) -> Array:
    """An answer of the linear program that pays charges wholly or not at all: those of which `found` pays little are ruled out, if
    that costs less, with all that is used paid in full.
    """
    prices = program.cost[charges]

    def in_full(answer: Array) -> float:
        unpaid = np.ceil(answer[charges] - PAID_ROUNDING) - answer[charges]
        return float(program.cost @ answer) + float(prices @ unpaid)

    least = in_full(found)
    if program.cost @ found >= least - PAID_ROUNDING:
        return found
    upper = program.upper.copy()
    upper[charges] = np.where(found[charges] < PAID, 0.0, upper[charges])
    answer = highs.relaxed(replace(program, upper=upper), effort).values
    return found if answer is None or in_full(answer) >= least else answer


def _cheapest(columns: _Columns, size: int, phases: int, unit: float) -> Array:
    """A point for the solver's: every group by the option that is cheapest for itself."""
    found = np.zeros(size)
    price = columns.common + columns.mean.sum(1)
    for group in np.unique(columns.group):
        mine = np.flatnonzero(columns.group == group)
        best = mine[price[mine].argmin()]
        found[best] = columns.count[best]
    found[size - phases :] = found[: len(columns.group)] @ columns.mean / unit
    return found


def _lines(problem: Problem, groups: list[list[int]]) -> tuple[list[Figures], Array]:
    """What each group may choose from, and the floor (see `relax.floor_of`)."""
    found = [figures(problem.items[group[0]].options, problem.ranks) for group in groups]
    floor = floor_of([len(group) for group in groups], found, problem.capacity)
    return [undominated(lines, problem.capacity, floor) for lines in found], floor


def _columns(groups: list[list[int]], lines: list[Figures], floor: Array) -> _Columns:
    number = np.repeat(np.arange(len(lines)), [len(found.option) for found in lines])
    count = np.array([float(len(group)) for group in groups])[number]
    option, common, mean, largest, memory = (
        np.concatenate([getattr(found, name) for found in lines]) for name in ("option", "common", "mean", "largest", "memory")
    )
    # A part below the floor says nothing: left out, it costs the solver no row.
    largest = np.where(largest > floor * (1 + 1e-9), largest, 0.0)
    return _Columns(number, option, count, common, mean, largest, memory, [names for found in lines for names in found.charges])


def _program(problem: Problem, columns: _Columns, names: list[str], groups: int) -> tuple[Program, float]:
    """The relaxation, and the seconds of its unit. Variables: amounts x, whether used u, charges y, Z.

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
    rows = Rows()
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
    whole = np.arange(size) < first_z
    return rows.program(cost, upper, whole), unit


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
