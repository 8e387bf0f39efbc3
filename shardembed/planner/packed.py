"""A small problem as one integer program: which option every item takes, and on which ranks its parts lie.

Nothing is forgotten here but unequal shares (`Sharing`): where no option has them and HiGHS says that there is no solution, there
is none. For what the search does not find: memory so tight that items go in one way only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shardembed.planner import highs
from shardembed.planner.highs import Answer, Effort, Rows
from shardembed.planner.problem import Array, Choice, Option, Problem, score

Index = NDArray[np.intp]
MOST = 20_000  # variables
PRECISION = 0.01  # relative; the search has more time for the rest
SLACK = 2e-6  # relative, what HiGHS may be off by


@dataclass(frozen=True)
class Packing:
    """A small problem, solved.

    Attributes:
        choices: of every item; None if none was found.
        impossible: none exists.
    """

    choices: tuple[Choice, ...] | None
    impossible: bool = False


def packed(problem: Problem, effort: Effort) -> Packing:
    """Some solution that fits into memory, and a fast one if work allows; or that there is none."""
    options = [option for item in problem.items for option in item.options]
    if sum(1 + max(1, len(_kinds(option)[1])) * problem.ranks for option in options) > MOST:
        return Packing(None)
    for spare in (0.0, SLACK):
        program = _Program(problem, 1.0 - spare)
        answer = program.solve(effort)
        if answer.impossible:
            return Packing(None, impossible=spare == 0.0 and all(option.sharing is None for option in options))
        if answer.values is None:
            return Packing(None)
        choices = program.choices(answer.values)
        if score(problem, choices).memory.max() <= problem.capacity:
            return Packing(choices)
    return Packing(None)


def _kinds(option: Option) -> tuple[Index, Index]:
    """Parts that are equal are one kind: (number of a part's kind `[n]`, parts of each kind)."""
    if not option.parts:
        return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp)
    lines = np.column_stack([option.loads, option.memory])
    _, kind, count = np.unique(lines, axis=0, return_inverse=True, return_counts=True)
    return kind.reshape(-1).astype(np.intp), count.astype(np.intp)


@dataclass
class _Columns:
    """One option's variables: `x` whether it is taken, `placed` how many parts of each kind lie on each rank `[kinds, R]`."""

    x: int
    kind: Index
    placed: Index
    nodes: Index = field(default_factory=lambda: np.zeros(0, dtype=np.intp))


class _Program:
    """Variables: x and placed of all options; charges; Z, the slowest rank of every phase."""

    def __init__(self, problem: Problem, room: float) -> None:
        self.problem, self.size = problem, 0
        self.columns = [[self._take(option) for option in item.options] for item in problem.items]
        self.charges = {name: self._more(1)[0] for name in problem.charges}
        self.z = self._more(len(problem.phases))
        self.rows = Rows()
        self.cost, self.upper = np.zeros(self.size), np.ones(self.size)
        self._memory: list[list[tuple[int, float]]] = [[] for _ in range(problem.ranks)]
        self._loads: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for item, columns in zip(problem.items, self.columns, strict=True):
            self.rows.add([column.x for column in columns], np.ones(len(columns)), 1.0, 1.0)
            for option, column in zip(item.options, columns, strict=True):
                self._place(option, column)
        self._limits(room)

    def _more(self, count: int) -> Index:
        self.size += count
        return np.arange(self.size - count, self.size)

    def _take(self, option: Option) -> _Columns:
        kind, count = _kinds(option)
        ranks = self.problem.ranks
        free = option.ranks is None
        placed = self._more(len(count) * ranks).reshape(len(count), ranks) if free else np.zeros((0, 0), dtype=np.intp)
        nodes = -(-ranks // self.problem.ranks_per_node) if option.node else 0
        return _Columns(int(self._more(1)[0]), kind, placed, self._more(nodes))

    def _place(self, option: Option, column: _Columns) -> None:
        x, ranks = column.x, range(self.problem.ranks)
        for name in option.charges:
            self.rows.add([self.charges[name], x], [1.0, -1.0], 0.0, np.inf)
        self.cost[x] += option.common.sum()
        for rank in ranks:
            self._memory[rank].append((x, option.common_memory))
        if option.ranks is not None:
            for part, rank in enumerate(option.ranks):
                self._on(rank, x, option.loads[part], option.memory[part])
            return
        for kind, placed in enumerate(column.placed):
            part = int(np.argmax(column.kind == kind))
            parts = option.divisible or int((column.kind == kind).sum())
            each = 1.0 / option.divisible if option.divisible else 1.0
            self.upper[placed] = option.divisible or 1
            self.rows.add([*placed, x], [*np.ones(len(placed)), -parts], 0.0, 0.0)
            for rank in ranks:
                self._on(rank, int(placed[rank]), each * option.loads[part], each * option.memory[part])
        if not option.divisible and len(column.placed) > 1:
            for rank in ranks:
                self.rows.add([*column.placed[:, rank], x], [*np.ones(len(column.placed)), -1.0], -np.inf, 0.0)
        if option.node:
            self.rows.add([*column.nodes, x], [*np.ones(len(column.nodes)), -1.0], 0.0, 0.0)
            for rank in ranks:
                node = column.nodes[rank // self.problem.ranks_per_node]
                for placed in column.placed:
                    self.rows.add([placed[rank], node], [1.0, -1.0], -np.inf, 0.0)

    def _on(self, rank: int, variable: int, loads: Array, memory: float) -> None:
        self._memory[rank].append((variable, memory))
        for phase in np.flatnonzero(loads):
            self._loads.setdefault((int(phase), rank), []).append((variable, loads[phase]))

    def _limits(self, room: float) -> None:
        problem = self.problem
        self.cost[self.z] = 1.0
        self.upper[self.z] = np.inf
        for name, variable in self.charges.items():
            self.cost[variable] = problem.charges[name].sum()
        for held in self._memory:
            held += [(variable, problem.charge_memory.get(name, 0.0)) for name, variable in self.charges.items()]
            variables, bytes_ = zip(*held, strict=True)
            self.rows.add(variables, np.array(bytes_) / problem.capacity, -np.inf, room)
        unit = max((seconds for line in self._loads.values() for _, seconds in line), default=1.0)
        for (phase, _), line in self._loads.items():
            variables, seconds = zip(*line, strict=True)
            self.rows.add([*variables, self.z[phase]], [*(-np.array(seconds) / unit), 1.0], 0.0, np.inf)
        self.cost /= unit
        self.cost[self.z] = 1.0

    def solve(self, effort: Effort) -> Answer:
        whole = np.ones(self.size, dtype=bool)
        whole[self.z] = False
        return highs.branched(self.rows.program(self.cost, self.upper, whole), effort, PRECISION)

    def choices(self, answer: Array) -> tuple[Choice, ...]:
        amounts = np.rint(answer[: self.z[0]]).astype(np.intp)
        found = []
        for item, columns in zip(self.problem.items, self.columns, strict=True):
            number = int(np.argmax([amounts[column.x] for column in columns]))
            found.append(self._choice(number, item.options[number], columns[number], amounts))
        return tuple(found)

    @staticmethod
    def _choice(number: int, option: Option, column: _Columns, amounts: Index) -> Choice:
        if option.ranks is not None or not option.parts:
            return Choice(number, option.ranks or ())
        placed = amounts[column.placed]
        if option.divisible:
            held = np.flatnonzero(placed[0])
            return Choice(number, tuple(held.tolist()), tuple(placed[0, held].tolist()))
        ranks = np.zeros(option.parts, dtype=np.intp)
        for kind, line in enumerate(placed):
            ranks[column.kind == kind] = np.flatnonzero(line)
        return Choice(number, tuple(ranks.tolist()))
