"""One search: the relaxation's choice placed greedily, then items taken out and put back elsewhere.

Each round takes a few items off the ranks that set the pace, and puts them back one by one with whichever of their options, on
whichever ranks, is best then. A round that makes things worse is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from shardembed.planner.bound import Bound
from shardembed.planner.finer import size_of
from shardembed.planner.highs import Effort
from shardembed.planner.level import value
from shardembed.planner.problem import Choice, Option, Problem
from shardembed.planner.relax import groups_of
from shardembed.planner.smooth import smooth
from shardembed.planner.state import Spent, State

GOOD = 5e-4  # a gap that is not worth another round
EXACT_RANKS = 32  # up to which a round is judged by the pool dealt out, not by the mean
SMALL_ROUNDS = 400  # of so few
SPREAD = (np.inf, 1.0, 0.7, 0.5, 0.25, 0.1, 0.0)  # ways to start: see `_construct`
MANY_SPREAD, MANY = (1.0, 0.5), 500  # where there are so many items
SMOOTHING = 0.04  # of all looks, for one state
LEVELLED = 2  # states to begin with
WAYS = 16  # to place an item, that are tried in a round


class Search:
    """Construction and rounds. Legend: candidates are option numbers, a list an item."""

    def __init__(
        self, problem: Problem, start: Bound, bound: Bound, finer: dict[int, list[int]], seed: int, effort: Effort
    ) -> None:
        self.problem, self.start, self.bound, self.effort = problem, start, bound, effort
        self.step = np.inf  # seconds of the state that was given last, once it is finished; inf where it cannot be
        self.draw, self.spent = np.random.default_rng(seed), Spent()
        chosen = (item.options[number] for item, number in zip(problem.items, start.options, strict=True))
        self.charges = frozenset(name for option in chosen for name in option.charges)
        self.candidates: list[list[int]] = [[]] * len(problem.items)
        for group, found in zip(groups_of(problem), start.lines, strict=True):
            beyond = np.maximum(found.largest - start.targets, 0.0).sum(1)
            # What an option adds for certain, and by how much its largest part passes what ranks are to have of each phase.
            price = found.common + found.mean.sum(1) + beyond
            ordered = list(dict.fromkeys(found.option[np.argsort(price, kind="stable")].tolist()))
            for item in group:
                self.candidates[item] = [start.options[item], *finer.get(item, []), *ordered]
                self.candidates[item] = list(dict.fromkeys(self.candidates[item])) if item in finer else ordered

    @property
    def enough(self) -> float:
        """Seconds of a step that is not worth another round."""
        return 0.0 if self.bound.value is None else self.bound.value * (1 + GOOD)

    def learn(self, step: float) -> None:
        """That there is a solution of `step` seconds."""
        self.bound = self.bound.under(step)

    def rounds(self) -> Iterator[State]:
        """States worth finishing: the constructed one, then those that rounds have improved."""
        small = self.problem.ranks <= EXACT_RANKS
        measure = (lambda state: value(state, self.effort)) if small else (lambda state: state.value)
        starts: list[tuple[float, State]] = []
        for start in self._starts(measure):  # the best of those that memory lets level
            if measure(start) >= min((step for step, _ in starts), default=np.inf):
                break
            yield start
            starts.append((self.step, start))
            if len(starts) >= LEVELLED and min(step for step, _ in starts) < np.inf:
                break
        if not starts:
            return
        state = min(starts, key=lambda pair: pair[0])[1]
        limit = min(SMALL_ROUNDS if small else max(40, min(800, 200_000 // (self.problem.ranks + 100))), self.effort.rounds)
        first = best = now = measure(state)
        kept, since = state.copy(), 0
        for number in range(limit):
            if self.effort.over or best <= self.enough or since > limit // 2 or self.spent.looks > self.effort.looks:
                break
            # Worse than the best by so much is let pass, less and less (record-to-record travel: Dueck, "New optimization
            # heuristics", Journal of Computational Physics 104, 1993): single moves alone end in the first local minimum.
            slack = 0.01 * (1 - number / limit) ** 2
            now = self._round(state, now, best * (1 + slack), measure)
            since += 1
            if now < best * (1 - 1e-7):
                best, kept, since = now, state.copy(), 0
            # Gone astray: on from the best again.
            elif since % 50 == 49:
                state, now = kept.copy(), best
        smooth(kept, self.effort.looks * SMOOTHING)
        if min(best, measure(kept)) < first:
            yield kept

    def _starts(self, measure: Callable[[State], float]) -> Iterator[State]:
        """States to begin with, the fastest first; last the one that takes least memory."""
        found: list[tuple[float, State]] = []
        for spread in SPREAD if len(self.problem.items) < MANY else MANY_SPREAD:
            state = self._construct(spread)
            if state is not None:
                if len(found) >= LEVELLED and min(value for value, _ in found) < float(state.mean.sum()) + state.alike:
                    continue  # no moves would make this one of the fastest
                smooth(state, self.effort.looks * SMOOTHING)
                found.append((measure(state), state))
                if found[-1][0] <= self.enough * (1 + GOOD):
                    break
        found.sort(key=lambda pair: pair[0])
        yield from (state for _, state in found)
        last = self._construct(None)
        if last is not None:
            yield last

    def _construct(self, spread: float | None) -> State | None:
        """Every item by the relaxation's option, the largest first, but items with parts of more than `spread` of a rank's seconds
        by the option with the most parts. What does not fit is placed otherwise; None: by whatever takes least memory.
        """
        state = State(self.problem, self.start.targets, self.spent)
        wanted = [self._wanted(item, np.inf if spread is None else spread) for item in range(len(self.problem.items))]
        sizes = [self._size(item, number) for item, number in enumerate(wanted)]
        chosen = [item.options[number] for item, number in zip(self.problem.items, wanted, strict=True)]
        free = [option.ranks is None and option.parts != self.problem.ranks for option in chosen]  # the others have no choice
        # What all ranks will hold alike is set aside from the start, so that what comes first leaves room for it.
        state.alike_memory += sum(option.common_memory for option in chosen)
        for item in sorted(range(len(sizes)), key=lambda item: (free[item], -sizes[item], item)):
            state.alike_memory -= chosen[item].common_memory
            if not self._insert_somehow(state, item, wanted[item], by_memory=spread is None):
                return None
        return state if state.fits else None

    def _wanted(self, item: int, spread: float) -> int:
        number = self.start.options[item]
        options = self.problem.items[item].options
        if self._size(item, number) <= spread or options[number].divisible:
            return number
        small = [other for other in self.candidates[item] if spread and self._size(item, other) <= spread]
        if small:  # the cheapest that makes no slab that the others do without
            return next((other for other in small if options[other].charges <= self.charges), small[0])
        return max(self.candidates[item], key=lambda other: options[other].parts)

    def _size(self, item: int, number: int) -> float:
        """How hard it is to find a place for an item's parts: seconds and bytes as shares of what a rank has."""
        option = self.problem.items[item].options[number]
        if not option.parts:
            return 0.0
        largest = size_of(option, self.start.targets, self.problem.capacity)
        return largest / 1e3 if option.divisible else largest  # these fill what is left

    def _insert_somehow(self, state: State, item: int, wanted: int, by_memory: bool) -> bool:
        if not by_memory:
            return state.insert(item, wanted) or self._best_insert(state, item)
        options = self.problem.items[item].options
        numbers = sorted(range(len(options)), key=lambda number: self._bytes(options[number]))
        return any(state.insert(item, number) for number in numbers)

    def _bytes(self, option: Option) -> float:
        most = float(option.memory.max()) / max(min(option.divisible, self.problem.ranks), 1) if option.parts else 0.0
        return most + option.common_memory * self.problem.ranks

    def _round(self, state: State, now: float, limit: float, measure: Callable[[State], float]) -> float:
        """Take some items out and put them back; undone if the state's value, `now` before, would pass `limit`. Gives the value."""
        uneven = state.unevenness
        items = self._pick(state)
        old = {item: state.choices[item] for item in items}
        for item in items:
            state.remove(item)
        # `measure` may solve a linear program: not for what is far off already.
        if all(self._best_insert(state, item) for item in items) and state.fits and state.value <= limit * 1.2:
            after = measure(state)
            if after < now * (1 - 1e-9) or (after <= limit and state.unevenness <= uneven * 1.02):
                return after
        for item in items:
            if state.choices[item] is not None:
                state.remove(item)
        for item, choice in old.items():
            assert choice is not None
            state.restore(item, choice)
        return now

    def _pick(self, state: State) -> list[int]:
        """Items of the rank that is slowest in some phase, and perhaps others."""
        excess = np.maximum(state.loads.max(0) - state.mean, 0.0) + 1e-3 * state.mean + 1e-15
        phase = int(self.draw.choice(len(excess), p=excess / excess.sum()))
        rank = int(state.loads[:, phase].argmax())
        there = state.items_on(rank)
        count = min(len(there), int(self.draw.integers(1, 4)))
        picked = self.draw.permutation(there)[:count].tolist() if count else []
        if not picked or self.draw.random() < 0.5:
            picked += self.draw.integers(0, len(self.problem.items), size=int(self.draw.integers(1, 3))).tolist()
        return list(dict.fromkeys(picked))

    def _best_insert(self, state: State, item: int) -> bool:
        best: tuple[float, float] | None = None
        chosen: Choice | None = None
        for number in self.candidates[item][:WAYS]:
            if not state.insert(item, number):
                continue
            worth = (state.value, state.unevenness)
            if best is None or worth < best:
                best, chosen = worth, state.choices[item]
            state.remove(item)
        if chosen is None:
            return False
        state.restore(item, chosen)
        return True
