"""Finds a plan near the bound: searches (`rounds`) from what the relaxation chose, and from other starts where that is far off.

Same problem, seed and effort, same plan and same bound: work is counted, and the clock ends it only where it is asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from shardembed.planner.bound import Bound, lower_bound
from shardembed.planner.finer import with_finer
from shardembed.planner.highs import PLAN, Effort
from shardembed.planner.level import FEW_VARIABLES, level, reopened
from shardembed.planner.others import others
from shardembed.planner.problem import Choice, Problem, Score, score
from shardembed.planner.result import INTERRUPTED, OUT_OF_TIME, gap_of
from shardembed.planner.rounds import GOOD, SMOOTHING, Search
from shardembed.planner.smooth import STEEPER, smooth
from shardembed.planner.state import State

AGAIN = 4  # times at most, that a state is levelled
FAR = 3e-3  # a gap from which on other starts are tried
SHORT, FEW_LOOKS = 60, 0.1  # rounds of each, and share of all looks
MOST_TRIED = 100_000  # entries of the relaxation's matrix, up to which they are tried
CLOSE, MOST_NEAR = 0.015, 4  # how much longer (relative) solutions take that come along, and how many do
# What is being done; seconds of the best step so far, and of the bound.
Progress = Callable[[str, float | None, float | None], None]


@dataclass(frozen=True)
class Solution:
    """What the search found.

    Attributes:
        choices: of every item.
        score: of these.
        bound: seconds that no solution beats; None where none is proved.
        stopped: why the search ended early, if it did.
        problem: with the options that the choices are of, where some came (see `finer`); None: the one that was to be solved.
        near: others that take hardly longer, the fastest first: counted otherwise, one of them may be faster.
    """

    choices: tuple[Choice, ...]
    score: Score
    bound: float | None
    stopped: str = ""
    problem: Problem | None = None
    near: tuple[Solution, ...] = ()

    @property
    def gap(self) -> float | None:
        return gap_of(self.score.step, self.bound)


def solve(problem: Problem, seed: int = 0, effort: Effort = PLAN, progress: Progress | None = None) -> Solution | None:
    """A solution and its bound, or None where no choice of options was found that fits into memory. Ctrl-C ends the search with the
    best so far, where there is one.
    """
    say = progress or (lambda doing, step, bound: None)
    say("bounding", None, None)
    bound = lower_bound(problem, effort)
    if bound is None:
        return None
    best: Solution | None = None
    seen: list[Solution] = []
    try:
        for found in _solutions(problem, bound, seed, effort):
            seen.append(found)
            if best is None or found.score.step < best.score.step:
                best = found
                bound = bound.under(found.score.step)
            say("searching", best.score.step, bound.value)
    except KeyboardInterrupt:
        if best is None:
            raise
        best = replace(best, stopped=INTERRUPTED)
    if best is None:
        return None
    over = OUT_OF_TIME if effort.over or bound.stopped else ""
    return replace(best, bound=bound.value, stopped=best.stopped or over, near=_near(best, seen) if _small(bound) else ())


def _near(best: Solution, seen: list[Solution]) -> tuple[Solution, ...]:
    """Of those seen, the next ones behind the best."""
    close = [found for found in seen if found is not best and found.score.step <= best.score.step * (1 + CLOSE)]
    return tuple(sorted(close, key=lambda found: found.score.step)[:MOST_NEAR])


def _small(bound: Bound) -> bool:
    """Whether there is time for more than one search."""
    return bound.relaxation.program.matrix.nnz <= MOST_TRIED


def _solutions(problem: Problem, bound: Bound, seed: int, effort: Effort) -> Iterator[Solution]:
    """From what the relaxation chose, and from other starts (`others`) where that is far from the bound: a short search each, and a
    long one from the start that came out best. Where there are many items, one search takes long enough.
    """
    won, least, proved = bound, np.inf, bound
    if _small(bound) and effort.work:
        short, first = replace(effort, rounds=min(effort.rounds, SHORT), looks=effort.looks * FEW_LOOKS), None
        for first in _searched(problem, bound, bound, seed, short):
            least = first.score.step
            yield first
        proved = bound.under(least)
        far = first is not None and proved.value is not None and least > proved.value * (1 + FAR)
        for other in others(bound, first.score, effort) if first is not None and far else []:
            for found in _searched(problem, other, proved, seed, short):
                won, least = (other, found.score.step) if found.score.step < least else (won, least)
                yield found
            if effort.over:
                return
    if proved.value is None or least > proved.value * (1 + GOOD):
        yield from _searched(problem, won, proved, seed, effort)


def _searched(problem: Problem, start: Bound, bound: Bound, seed: int, effort: Effort) -> Iterator[Solution]:
    """Solutions of one search, each better than those before, until one is near enough to the bound."""
    problem, finer = with_finer(problem, start)
    search, least = Search(problem, start, bound, finer, seed, effort), np.inf
    for state in search.rounds():
        found = _levelled(state, effort)
        search.step = np.inf if found is None else found.score.step
        if found is not None and found.score.step < least:
            least = found.score.step
            search.learn(least)
            yield found
        if least <= search.enough:
            return


def _levelled(state: State, effort: Effort) -> Solution | None:
    """The state with everything settled: then parts are moved and what may be shared is dealt out anew, as long as that helps."""
    best: Solution | None = None
    done = level(state, effort) or level(state, effort, FEW_VARIABLES)
    for _ in range(AGAIN):
        if done is None:
            break
        even = done.copy()
        slowest = done.loads.max(0)  # of each phase: what counts now
        even.scale = np.maximum(slowest, slowest.sum() * 1e-6 + 1e-30)
        smooth(even, effort.looks * SMOOTHING, STEEPER)
        found = [solution for solution in (best, _finished(done), _finished(even)) if solution is not None]
        before, best = best, min(found, key=lambda solution: solution.score.step, default=None)
        if best is None or (before is not None and best.score.step > before.score.step * (1 - GOOD)):
            break
        done = level(reopened(even), effort)
    return best


def _finished(state: State) -> Solution | None:
    choices = tuple(choice for choice in state.choices if choice is not None)
    found = score(state.problem, choices)
    if found.memory.max() > state.problem.capacity:
        return None
    return Solution(choices, found, None, problem=state.problem)
