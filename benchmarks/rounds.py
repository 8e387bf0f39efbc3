"""All contenders take turns, round after round, so that a noisy moment troubles them alike.

A turn is a step that is not timed, and then a few that are, one after the other as in training. Ranks leave a barrier together, and
the last to end counts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

from benchmarks.contenders import Contender
from shardembed.planner.calibrate.stages import barrier


def take_turns(contenders: Sequence[Contender], rounds: int, steps: int) -> dict[str, list[float | None]]:
    """Milliseconds of a step, by contender and round; None where it sat out. Collective."""
    times: dict[str, list[float | None]] = {contender.name: [] for contender in contenders}
    for number in range(-1, rounds):  # the first round warms caches and buffers
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:  # none always runs after the same other one
            runs = number % contender.every == 0 or number < 0
            taken = turn(contender, number * (steps + 1), steps) if runs else None
            if number >= 0:
                times[contender.name].append(taken)
    return times


def turn(contender: Contender, first: int, steps: int) -> float:
    """Milliseconds of each of `steps` steps, from batch `first` + 1 on. Collective."""
    if contender.ahead is not None:
        return _turn_ahead(contender, first, steps)
    batches = contender.batches
    contender.step(batches[first % len(batches)])
    barrier()
    began = time.perf_counter()
    for number in range(first + 1, first + 1 + steps):
        contender.step(batches[number % len(batches)])
    barrier()
    return 1e3 * (time.perf_counter() - began) / steps


def _turn_ahead(contender: Contender, first: int, steps: int) -> float:
    """Steady state: as many batches are sent ahead in the time that is taken as are trained. The one that is sent ahead beside the
    last step is trained later, untimed.
    """
    assert contender.ahead is not None
    batches = contender.batches
    loader = [batches[number % len(batches)] for number in range(first, first + steps + 2)]
    tickets = contender.ahead(loader)
    contender.step(next(tickets))
    barrier()
    began = time.perf_counter()
    for ticket in itertools.islice(tickets, steps):
        contender.step(ticket)
    barrier()
    taken = time.perf_counter() - began
    for ticket in tickets:
        contender.step(ticket)
    return 1e3 * taken / steps
