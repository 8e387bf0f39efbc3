"""Evens ranks out by moving single parts, and by swapping pairs of them: many cheap steps, where `search` makes few costly ones.

A step takes the sum over phases of the slowest rank, which moves of single parts seldom change; what they lower here is a power sum
of every rank's share of what it is to have, which the slowest ranks make up nearly alone:

    sum over ranks r and phases p of scale[p] x (load[p, r] / scale[p]) ^ Q

Each step takes the rank with the largest part of that sum and makes the best move or swap with one of the ranks with the least.
Legend: n parts on the rank, m parts on others, R ranks, P phases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shardembed.planner.problem import Array, Choice, Numbers
from shardembed.planner.state import State

Q, STEEPER = 16, 32  # the latter where all is settled
OTHERS = 48  # ranks with least to do, that take part in a step
PARTS = 32  # of a rank, the heaviest
LEAST = 1e-7  # relative, that a step must gain
PAIR = 0.2  # looks at a rank (`state.Spent`), that a pair of parts is taken for


@dataclass
class _Parts:
    """All parts that may be moved: those of options whose parts lie on any different ranks, with the shares that they have.

    Attributes:
        item: of each.
        number: among its item's parts.
        loads: `[m, P]`, as shares of the scale.
        memory: bytes.
        rank: where it lies.
    """

    item: Numbers
    number: Numbers
    loads: Array
    memory: Array
    rank: Numbers

    @staticmethod
    def of(state: State) -> _Parts | None:
        found: list[tuple[Numbers, Numbers, Array, Array, Numbers]] = []
        for item, choice in enumerate(state.choices):
            if choice is None or not choice.ranks or len(choice.ranks) >= state.problem.ranks:
                continue
            option, count = state.option(item), len(choice.ranks)
            if option.ranks is not None or option.node:
                continue
            loads, memory = state.parts_of(option, choice)
            found.append((np.full(count, item), np.arange(count), loads / state.scale, memory, np.array(choice.ranks)))
        return _Parts(*(np.concatenate(column) for column in zip(*found, strict=True))) if found else None


def smooth(state: State, looks: float, steep: int = Q) -> None:
    """Move and swap parts until no step gains any more, or so many looks are used up; what all ranks do alike stays as it is."""
    parts, problem = _Parts.of(state), state.problem
    if parts is None or problem.ranks == 1:
        return
    weights = state.scale / state.scale.sum()

    def power(shares: Array) -> Array:
        return shares**steep @ weights

    shares = state.loads / state.scale
    energy, stuck = power(shares), np.zeros(problem.ranks, dtype=bool)
    limit = state.spent.looks + looks
    while state.spent.looks < limit and not stuck.all():
        worst = int(np.where(stuck, -1.0, energy).argmax())
        mine = np.flatnonzero(parts.rank == worst)
        mine = mine[np.argsort(-parts.loads[mine].max(1), kind="stable")[:PARTS]]
        others = np.argsort(energy, kind="stable")[:OTHERS]
        others = others[others != worst]
        theirs = np.flatnonzero(np.isin(parts.rank, others))
        state.spent.looks += problem.ranks + len(mine) * (len(others) + len(theirs)) * PAIR
        room = problem.capacity - state.alike_memory - state.memory
        best, step = -LEAST * float(energy.max()), None
        moved = parts.loads[mine]
        gain = power(shares[worst] - moved)[:, None] + power(shares[others] + moved[:, None]) - energy[worst] - energy[others]
        gain[state.holds(parts.item[mine], others) | (parts.memory[mine][:, None] > room[others])] = np.inf
        if gain.size and gain.min() < best:
            place = np.unravel_index(int(gain.argmin()), gain.shape)
            best, step = float(gain[place]), [(int(mine[place[0]]), int(others[place[1]]))]
        where = parts.rank[theirs]
        moved = parts.loads[mine][:, None] - parts.loads[theirs]
        gain = power(shares[worst] - moved) + power(shares[where] + moved) - energy[worst] - energy[where]
        more = parts.memory[mine][:, None] - parts.memory[theirs]
        closed = state.holds(parts.item[mine], where) | state.holds(parts.item[theirs], np.array([worst])).T
        gain[closed | (more > room[where]) | (-more > room[worst])] = np.inf
        if gain.size and gain.min() < best:
            place = np.unravel_index(int(gain.argmin()), gain.shape)
            one, other = int(mine[place[0]]), int(theirs[place[1]])
            step = [(one, int(parts.rank[other])), (other, worst)]
        if step is None:
            stuck[worst] = True
            continue
        touched = [worst, *(rank for _, rank in step)]
        for part, rank in step:
            _move(state, parts, part, rank)
        shares[touched] = state.loads[touched] / state.scale
        energy[touched] = power(shares[touched])
        stuck[touched] = False


def _move(state: State, parts: _Parts, part: int, rank: int) -> None:
    item = int(parts.item[part])
    choice = state.choices[item]
    assert choice is not None
    ranks = list(choice.ranks)
    ranks[int(parts.number[part])] = rank
    state.remove(item)
    state.restore(item, Choice(choice.option, tuple(ranks), choice.shares))
    parts.rank[part] = rank
