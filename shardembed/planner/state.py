"""A solution under construction: what every rank carries so far, and where the next parts would hurt least.

Divisible options lie in a pool here, on no rank yet: they fill what the others leave uneven (`level.py`). Until that is worked out,
a state's value counts for every phase the slowest rank or the mean, whichever is more: no levelling can do better.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shardembed.planner.problem import Array, Choice, Numbers, Option, Problem

STEEP = 4  # power of a rank's load in the choice between ranks that cost nothing now: the emptier, the better
ONE_BY_ONE = 24  # parts that are put down one by one; more are dealt out in one go
LOOK = 200  # ranks' worth of work, that every look at all of them takes


@dataclass
class Spent:
    """Work done on a state and all its copies.

    Attributes:
        looks: at a rank for a part.
    """

    looks: float = 0.0


class State:
    """Items that have been placed, and the loads they make.

    Attributes:
        problem: whose items these are.
        scale: `[P]`, seconds of each phase that are thought normal; only used to weigh phases against each other.
        loads: `[R, P]` seconds, without what all ranks do alike.
        memory: `[R]` bytes, without what all ranks hold alike.
        pool: `[P]` seconds of what lies on no rank yet.
        pool_memory: its bytes.
        alike: seconds, all phases together, that every rank has.
        alike_memory: bytes that every rank holds.
        choices: of every item; None where it is not placed.
        spent: of the work done.
    """

    def __init__(self, problem: Problem, scale: Array, spent: Spent | None = None) -> None:
        phases = len(problem.phases)
        self.problem, self.spent = problem, spent or Spent()
        self.scale = np.maximum(scale, scale.sum() * 1e-6 + 1e-30)
        self.loads = np.zeros((problem.ranks, phases))
        self.memory = np.zeros(problem.ranks)
        self.pool = np.zeros(phases)
        self.pool_memory = 0.0
        self.alike = 0.0 if problem.base is None else float(problem.base.sum())
        self.alike_memory = 0.0
        self.choices: list[Choice | None] = [None] * len(problem.items)
        self._uses: dict[str, int] = dict.fromkeys(problem.charges, 0)
        self._holds = np.zeros((len(problem.items), problem.ranks), dtype=bool)

    def copy(self) -> State:
        """The same state, to go on from on its own."""
        other = copy.copy(self)
        other.loads, other.memory, other.pool = self.loads.copy(), self.memory.copy(), self.pool.copy()
        other.choices, other._uses, other._holds = list(self.choices), dict(self._uses), self._holds.copy()
        return other

    def items_on(self, rank: int) -> Numbers:
        """Numbers of the items with a part on a rank; those in the pool are on none."""
        return np.flatnonzero(self._holds[:, rank])

    def holds(self, items: Numbers, ranks: Numbers) -> NDArray[np.bool_]:
        """`[items, ranks]`: which items have a part on which ranks."""
        return self._holds[np.ix_(items, ranks)]

    @property
    def value(self) -> float:
        """Seconds of a step, if the pool can be levelled."""
        return float(np.maximum(self.loads.max(0), self.mean).sum()) + self.alike

    @property
    def mean(self) -> Array:
        """`[P]` seconds of a rank if all were level, the pool included."""
        return (self.loads.sum(0) + self.pool) / self.problem.ranks

    @property
    def unevenness(self) -> float:
        """Breaks ties between states of equal value."""
        return float(((self.loads / self.scale) ** 2).mean(0) @ self.scale)

    @property
    def fits(self) -> bool:
        free = self.problem.capacity - self.alike_memory - self.memory
        return bool(free.min() >= 0) and self.pool_memory <= free.sum()

    @property
    def pooled(self) -> list[int]:
        """Numbers of the items in the pool."""
        found = ((number, choice) for number, choice in enumerate(self.choices) if choice is not None)
        return [number for number, choice in found if self.option(number).divisible and not choice.ranks]

    @property
    def unsettled(self) -> list[int]:
        """Numbers of the items whose parts may get unequal shares and have none yet."""
        found = ((number, choice) for number, choice in enumerate(self.choices) if choice is not None)
        open_ = [number for number, choice in found if self.option(number).sharing is not None and choice.shares is None]
        return [number for number in open_ if self.option(number).parts > 1]

    def option(self, item: int) -> Option:
        choice = self.choices[item]
        assert choice is not None
        return self.problem.items[item].options[choice.option]

    def insert(self, item: int, number: int) -> bool:
        """Place an item by option `number` where it hurts least; a divisible one goes into the pool. False, and nothing is changed,
        where its parts do not fit.
        """
        option = self.problem.items[item].options[number]
        self._alike(option, 1)
        ranks: tuple[int, ...] = ()
        if option.parts and not option.divisible:
            found = self.place(option)
            if found is None:
                self._alike(option, -1)
                return False
            ranks = tuple(found.tolist())
        self.restore(item, Choice(number, ranks), alike=False)
        return True

    def remove(self, item: int) -> None:
        choice = self.choices[item]
        assert choice is not None
        option = self.problem.items[item].options[choice.option]
        self._alike(option, -1)
        self._add(option, choice, -1)
        self._holds[item, list(choice.ranks)] = False
        self.choices[item] = None

    def restore(self, item: int, choice: Choice, alike: bool = True) -> None:
        """Put an item where `choice` says."""
        option = self.problem.items[item].options[choice.option]
        if alike:
            self._alike(option, 1)
        self._add(option, choice, 1)
        self._holds[item, list(choice.ranks)] = True
        self.choices[item] = choice

    def _alike(self, option: Option, sign: int) -> None:
        self.alike += sign * float(option.common.sum())
        self.alike_memory += sign * option.common_memory
        for name in option.charges:
            before = self._uses[name]
            self._uses[name] = before + sign
            # The first item that uses a charge pays it, the last one gives it back.
            if (before == 0) != (before + sign == 0):
                self.alike += sign * float(self.problem.charges[name].sum())
                self.alike_memory += sign * self.problem.charge_memory.get(name, 0.0)

    def parts_of(self, option: Option, choice: Choice) -> tuple[Array, Array]:
        """`[n, P]` seconds and `[n]` bytes of parts that lie on ranks."""
        if choice.shares is None:
            return option.loads, option.memory
        if option.sharing is not None:
            weights = np.asarray(choice.shares, dtype=np.float64) / option.sharing.parts
            return option.sharing.loads(weights), option.sharing.memory(weights)
        weights = np.asarray(choice.shares, dtype=np.float64) / option.divisible
        return weights[:, None] * option.loads, weights * option.memory

    def _add(self, option: Option, choice: Choice, sign: int) -> None:
        if not option.parts:
            return
        held = list(choice.ranks)
        if option.divisible and not held:
            self.pool += sign * option.total
            self.pool_memory += sign * float(option.memory[0])
            return
        loads, memory = self._add_shares(option, choice, sign) if option.sharing is not None else self.parts_of(option, choice)
        if len(set(held)) == len(held):
            self.loads[held] += sign * loads
            self.memory[held] += sign * memory
        else:  # pinned by the user to one rank several times
            np.add.at(self.loads, held, sign * loads)
            np.add.at(self.memory, held, sign * memory)

    def _add_shares(self, option: Option, choice: Choice, sign: int) -> tuple[Array, Array]:
        """What the parts add to their ranks. Until shares are settled they are even, and what lies on all ranks joins the pool."""
        sharing = option.sharing
        assert sharing is not None
        if choice.shares is None and option.parts < self.problem.ranks:
            return option.loads, option.memory
        if choice.shares is None:
            self.pool += sign * sharing.linear
            self.pool_memory += sign * sharing.memory_linear
            answers = sharing.answers(np.full(option.parts, 1.0 / option.parts))
            return answers[:, None] * sharing.answer, answers * sharing.memory_answer
        weights = np.asarray(choice.shares, dtype=np.float64) / sharing.parts
        more = sharing.beyond_even(weights, option.parts)
        self.alike += sign * more * float(sharing.common_answer.sum())
        self.alike_memory += sign * more * sharing.memory_common
        return self.parts_of(option, choice)

    def cost(self, loads: Array, memory: float, peak: Array) -> Array:
        """`[R]`: what a part would cost on each rank; inf where it does not fit. peak: `[P]` loads that cost nothing to reach."""
        self.spent.looks += self.problem.ranks + LOOK
        after = self.loads + loads
        excess = np.maximum(after - peak, 0.0).sum(1)
        filled = ((after / self.scale) ** STEEP) @ self.scale
        held = self.memory + memory + self.alike_memory
        filled += (held / self.problem.capacity) ** STEEP * self.scale.sum()
        # What makes a step longer comes first by far; among ranks where nothing does, the emptier.
        cost = excess * 1e3 + filled
        cost[held > self.problem.capacity] = np.inf
        return cost

    def place(self, option: Option) -> Numbers | None:
        """The rank of each part, `[n]`; the option's own `common` and charges must be in the state already."""
        loads, memory = option.loads, option.memory
        if option.ranks is not None:
            return self._pinned(option.ranks, memory)
        parts, everywhere = option.parts, option.parts == self.problem.ranks
        if parts > self.problem.ranks:
            return None
        alike = parts == 1 or (_alike(loads.sum(1)) and _alike(memory))
        if alike and everywhere:
            fits = float(self.memory.max() + memory[0]) + self.alike_memory <= self.problem.capacity
            return np.arange(parts) if fits else None
        peak = np.maximum(self.loads.max(0), self.mean + option.total / self.problem.ranks)
        if option.node:
            return self._inside_node(loads, memory, peak)
        order = np.arange(parts) if alike else np.argsort(-(loads / self.scale).sum(1), kind="stable")
        ranks = np.empty(parts, dtype=np.intp)
        # One order of the ranks serves for all parts: those that cost least take one each.
        if parts > ONE_BY_ONE or alike:
            cost = self.cost(loads[0] if alike else loads.mean(0), float(memory.max()), peak)
            best = np.argsort(cost, kind="stable")[:parts]
            ranks[order] = best
            return ranks if np.isfinite(cost[best[-1]]) else None
        allowed = np.ones(self.problem.ranks, dtype=bool)
        for part in order:
            cost = self.cost(loads[part], float(memory[part]), peak)
            cost[~allowed] = np.inf
            best = int(cost.argmin())
            if not np.isfinite(cost[best]):
                return None
            ranks[part] = best
            allowed[best] = False
        return ranks

    def _pinned(self, where: tuple[int, ...], memory: Array) -> Numbers | None:
        ranks = np.asarray(where, dtype=np.intp)
        after = self.memory.copy()
        np.add.at(after, ranks, memory)
        return ranks if (after[ranks] + self.alike_memory <= self.problem.capacity).all() else None

    def _inside_node(self, loads: Array, memory: Array, peak: Array) -> Numbers | None:
        size = self.problem.ranks_per_node
        cost = self.cost(loads.mean(0), float(memory.max()), peak)
        best: tuple[float, Numbers] | None = None
        for first in range(0, self.problem.ranks, size):
            node = cost[first : first + size]
            if len(node) < len(memory):
                continue
            chosen = np.sort(np.argsort(node, kind="stable")[: len(memory)])
            price = float(node[chosen].sum())
            if np.isfinite(price) and (best is None or price < best[0]):
                best = price, chosen + first
        return None if best is None else best[1]


def _alike(numbers: Array) -> bool:
    """Equal but for rows that do not divide evenly."""
    return float(numbers.max() - numbers.min()) <= 1e-3 * float(numbers.max())
