"""A problem with few large pieces, solved as what it is: an integer program, by HiGHS.

Where a handful of tables must be dealt to a handful of ranks, what they weigh does not divide evenly: a relaxation's bound is then
far below what any plan can do, and swaps get stuck. Items that share their options are counted, not told apart:

    minimise sum_p T_p   with   y[g, o] items of group g taking option o, which sum to the group's size,
    x[g, o, r] parts of theirs on rank r, at most one an item (or any number, of a divisible option),
    base + charges + sum y common + sum x load <= T_p   and   sum y common + sum x bytes <= capacity   on every rank.

Legend: P phases, R ranks; a variable is a column, numbered as it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse import coo_matrix, csr_array

from shardembed.planner import highs
from shardembed.planner.highs import Effort, Program
from shardembed.planner.problem import Array, Choice, Item, Option, Problem, score
from shardembed.planner.relax import groups_of
from shardembed.planner.search import Solution

MOST_VARIABLES = 12_000  # with more, HiGHS does not get far
Line = dict[int, float]  # a variable's coefficient
NEAR = 5e-4  # a gap at which HiGHS may stop
SLACK = 1e-5  # relative; a bound that lies further above a solution is none


def improved(problem: Problem, solution: Solution | None, effort: Effort) -> Solution | None:
    """The better of `solution` and what HiGHS finds, with the better of both bounds; problems that are too large for it, or whose
    options it cannot tell, come back as they are.
    """
    program = _Program.of(problem)
    if program is None:
        return solution
    choices, bound = program.solve(effort)
    if not program.whole:
        easier = _Program.of(_easier(problem))
        bound = None if easier is None else easier.solve(effort)[1]
    best = solution
    if choices is not None:
        found = score(problem, choices)
        if found.memory.max() <= problem.capacity and (solution is None or found.step < solution.score.step):
            best = Solution(choices, found, None)
    if best is None:
        return None
    step = best.score.step
    known = [value for value in (bound, solution and solution.bound) if value is not None and value <= step * (1 + SLACK)]
    return replace(best, bound=min(max(known), step) if known else None)


def _easier(problem: Problem) -> Problem:
    """The problem with parts that differ inside a node taken for the least of them: no solution takes longer than it did."""
    known: dict[int, tuple[Option, ...]] = {}
    for item in problem.items:
        if id(item.options) not in known:
            found = (_least(option) if _in_one_order(option, problem) else option for option in item.options)
            known[id(item.options)] = tuple(found)
    return replace(problem, items=tuple(Item(item.name, known[id(item.options)]) for item in problem.items))


def _least(option: Option) -> Option:
    loads, memory = option.loads, option.memory
    return replace(option, loads=np.broadcast_to(loads.min(0), loads.shape), memory=np.full_like(memory, memory.min()))


@dataclass(frozen=True)
class _Taken:
    """The variables of a group's option: those that sum to the items that take it, and its parts by place (a rank, or a node).

    Where an item has one place, the places count the items: a further variable would only mislead the branching.
    """

    option: int
    counts: tuple[int, ...]
    places: tuple[int, ...]


@dataclass
class _Program:
    problem: Problem
    groups: list[list[int]]
    whole: bool  # every solution is one of the program, so that its bound is one on the problem
    taken: list[list[_Taken]] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)
    rows: list[tuple[Line, float, float]] = field(default_factory=list)  # coefficients, least, most

    @staticmethod
    def of(problem: Problem) -> _Program | None:
        """The program, or None where it would be too large, or has an option that is not linear or whose parts differ and may lie
        anywhere.
        """
        groups = groups_of(problem)
        options = [problem.items[group[0]].options for group in groups]
        flat = [option for each in options for option in each]
        if not all(_tellable(option, problem) or _in_one_order(option, problem) for option in flat):
            return None
        if sum(1 + _places(option, problem) for each in options for option in each) > MOST_VARIABLES:
            return None
        program = _Program(problem, groups, all(_tellable(option, problem) for option in flat))
        program._build(options)
        return program

    def solve(self, effort: Effort) -> tuple[tuple[Choice, ...] | None, float | None]:
        """Choices, if any were found, and a lower bound on what any take, if one is proved."""
        phases = len(self.problem.phases)
        cost = np.zeros(len(self.upper))
        cost[:phases] = 1.0
        entries, least, upper = zip(*self.rows, strict=True)
        line, column, value = zip(*_triples(entries), strict=True)
        matrix = csr_array(coo_matrix((value, (line, column)), shape=(len(entries), len(cost))))
        whole = np.arange(len(cost)) >= phases
        program = Program(cost, matrix, np.array(least), np.array(upper), np.array(self.upper), whole)
        found = highs.branched(program, effort, NEAR)
        choices = None if found.values is None else self._choices(np.round(found.values))
        if found.bound is None or not self.whole:
            return choices, None
        # HiGHS keeps to its constraints within a tolerance of 1e-6 of figures near one.
        proved = (found.bound - 1e-6) * self._scale
        return choices, proved if proved > 0 else None

    # The program.

    def _build(self, options: Sequence[tuple[Option, ...]]) -> None:
        problem = self.problem
        phases, ranks = len(problem.phases), problem.ranks
        self._scale = _scale(problem)
        self._new(phases, np.inf)
        base = np.zeros(phases) if problem.base is None else problem.base / self._scale
        everywhere: list[Line] = [{p: -1.0} for p in range(phases)]
        held: Line = {}
        ranked: list[list[Line]] = [[{} for _ in range(ranks)] for _ in range(phases)]
        stored: list[Line] = [{} for _ in range(ranks)]
        charged = self._charges(everywhere, held)
        for group, each in zip(self.groups, options, strict=True):
            self.taken.append([])
            for number, option in enumerate(each):
                counts, places = self._variables(option, len(group), ranked, stored)
                for count in counts:
                    for phase in range(phases):
                        _add(everywhere[phase], count, option.common[phase] / self._scale)
                    _add(held, count, option.common_memory / problem.capacity)
                for name in option.charges:
                    self.rows.append(({**dict.fromkeys(counts, 1.0), charged[name]: -float(len(group))}, -np.inf, 0.0))
                self.taken[-1].append(_Taken(number, counts, places))
            self.rows.append(({c: 1.0 for taken in self.taken[-1] for c in taken.counts}, len(group), len(group)))
        for phase in range(phases):
            for line in ranked[phase]:
                self.rows.append((_sum(everywhere[phase], line), -np.inf, -float(base[phase])))
        for line in stored:
            self.rows.append((_sum(held, line), -np.inf, 1.0))

    def _charges(self, everywhere: list[Line], held: Line) -> dict[str, int]:
        found = {}
        for name, seconds in sorted(self.problem.charges.items()):
            found[name] = self._new(1, 1)
            for phase, line in enumerate(everywhere):
                _add(line, found[name], seconds[phase] / self._scale)
            _add(held, found[name], self.problem.charge_memory.get(name, 0.0) / self.problem.capacity)
        return found

    def _variables(
        self, option: Option, size: int, ranked: list[list[Line]], stored: list[Line]
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """New variables for how many items take an option and where their parts lie, and what these add to the ranks."""
        problem = self.problem
        if not option.parts or option.ranks is not None:
            count = self._new(1, size)
            for part, rank in enumerate(option.ranks or ()):
                self._part(option.loads[part], option.memory[part], count, rank, ranked, stored)
            return (count,), ()
        node = problem.ranks_per_node
        whole_nodes = option.node and option.parts > 1
        spots = problem.ranks // node if whole_nodes else problem.ranks
        parts = option.divisible or (1 if whole_nodes else option.parts)
        first = self._new(spots, size * (option.divisible or 1))
        places = tuple(range(first, first + spots))
        counts = places
        if parts > 1:
            counts = (self._new(1, size),)
            self.rows.append(({**dict.fromkeys(places, 1.0), counts[0]: -float(parts)}, 0.0, 0.0))
        for place, variable in enumerate(places):
            if whole_nodes:
                for part in range(option.parts):
                    self._part(option.loads[part], option.memory[part], variable, place * node + part, ranked, stored)
                continue
            if parts > 1 and not option.divisible:
                self.rows.append(({variable: 1.0, counts[0]: -1.0}, -np.inf, 0.0))  # its parts go to different ranks
            share = option.divisible or 1
            self._part(option.loads[0] / share, option.memory[0] / share, variable, place, ranked, stored)
        return counts, places

    def _part(
        self,
        loads: Array,
        memory: float,
        variable: int,
        rank: int,
        ranked: list[list[Line]],
        stored: list[Line],
    ) -> None:
        for phase, load in enumerate(loads):
            _add(ranked[phase][rank], variable, load / self._scale)
        _add(stored[rank], variable, memory / self.problem.capacity)

    def _new(self, count: int, most: float) -> int:
        self.upper += [most] * count
        return len(self.upper) - count

    # The way back.

    def _choices(self, values: Array) -> tuple[Choice, ...]:
        found: dict[int, Choice] = {}
        for group, taken in zip(self.groups, self.taken, strict=True):
            items = iter(group)
            for one in taken:
                option = self.problem.items[group[0]].options[one.option]
                number = int(values[list(one.counts)].sum())
                left = values[list(one.places)].astype(int)
                for remaining in range(number, 0, -1):
                    found[next(items)] = _choice(option, one.option, left, remaining, self.problem.ranks_per_node)
        return tuple(found[item] for item in range(len(self.problem.items)))


def _choice(option: Option, number: int, left: np.ndarray, remaining: int, node: int) -> Choice:
    """One item's places out of what `remaining` items have `left`, which it takes away."""
    if not option.parts:
        return Choice(number, ())
    if option.ranks is not None:
        return Choice(number, option.ranks)
    if option.divisible:
        shares, wanted = np.zeros_like(left), option.divisible
        for rank in np.flatnonzero(left):
            shares[rank] = min(wanted, left[rank])
            wanted -= shares[rank]
        left -= shares
        ranks = np.flatnonzero(shares)
        return Choice(number, tuple(ranks.tolist()), tuple(shares[ranks].tolist()))
    if option.node and option.parts > 1:
        place = int(left.argmax())
        left[place] -= 1
        return Choice(number, tuple(range(place * node, (place + 1) * node)))
    # The fullest first: no rank may keep more than one part for each item that is still to come.
    ranks = np.argsort(-left, kind="stable")[: option.parts]
    left[ranks] -= 1
    return Choice(number, tuple(sorted(ranks.tolist())))


def _tellable(option: Option, problem: Problem) -> bool:
    if option.sharing is not None:
        return False  # unequal shares are not linear
    if option.parts <= 1 or option.ranks is not None:
        return True
    if not ((option.loads == option.loads[0]).all() and (option.memory == option.memory[0]).all()):
        return False  # which part lies where, also within a node, is not told
    return not option.node or (option.parts == problem.ranks_per_node and problem.ranks % problem.ranks_per_node == 0)


def _in_one_order(option: Option, problem: Problem) -> bool:
    """Parts that fill a node and differ: the program knows them in one order only."""
    return option.sharing is None and option.node and option.parts == problem.ranks_per_node and not problem.ranks % option.parts


def _places(option: Option, problem: Problem) -> int:
    if not option.parts or option.ranks is not None:
        return 0
    return problem.ranks // problem.ranks_per_node if option.node and option.parts > 1 else problem.ranks


def _scale(problem: Problem) -> float:
    """Seconds that make figures near one: what ranks would take if every item's cheapest option divided evenly."""
    total = 0.0
    for item in problem.items:
        total += min(float((option.total / problem.ranks + option.common).sum()) for option in item.options)
    return total or 1.0


def _add(line: Line, variable: int, value: float) -> None:
    if value:
        line[variable] = line.get(variable, 0.0) + value


def _sum(first: Line, second: Line) -> Line:
    found = dict(first)
    for variable, value in second.items():
        _add(found, variable, value)
    return found


def _triples(lines: Sequence[Line]) -> Iterator[tuple[int, int, float]]:
    for number, line in enumerate(lines):
        for column, value in line.items():
            yield number, column, value
