"""All contenders take turns, round after round, so that a noisy moment troubles them alike.

A turn is some steps, one after the other as in training, each between two barriers; the first of them, which find the caches full
of others' rows, are not counted.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping

import torch.distributed as dist

from benchmarks.crew import Contender, Crew

FIRST = 5  # steps that are made before all rounds
UNCOUNTED = 2  # steps at the beginning of a turn


def take_turns(
    crews: Mapping[str, Crew], rounds: int, steps: int, every: Mapping[str, int] | None = None
) -> dict[str, list[float | None]]:
    """Milliseconds of each counted step, by contender, in order of rounds; None in rounds in which it sat out.

    Args:
        every: rounds between the turns of a contender, by name, for those that are much slower than all others.
    """
    every = every or {}
    times: dict[str, list[float | None]] = {name: [] for name in crews}
    for name, crew in crews.items():
        crew.do(turn, 0, 0, FIRST if every.get(name, 1) == 1 else 1)
    for number in range(rounds):
        names = list(crews)
        first = number // 2 % len(names)
        order = [*names[first:], *names[:first]]
        for name in reversed(order) if number % 2 else order:  # none always runs after the same other one
            runs = number % every.get(name, 1) == 0
            times[name] += crews[name].do(turn, number * (UNCOUNTED + steps), UNCOUNTED, steps)[0] if runs else [None] * steps
    return times


def turn(contender: Contender, first: int, uncounted: int, steps: int) -> list[float]:
    """Milliseconds of `steps` steps, after some that do not count, from batch `first` on. All ranks of the contender at once.

    Steps whose ids are sent ahead are counted in a steady state: as many batches are sent in the counted time as are trained. What
    is sent beside the last of them is trained later, and not counted.
    """
    batches, ran = contender.batches, uncounted + steps
    loader = [batches[number % len(batches)] for number in range(first, first + ran + (contender.ahead is not None))]
    given = iter(contender.ahead(loader) if contender.ahead else loader)
    times = []
    for _ in range(ran):
        barrier()
        began = time.perf_counter()
        contender.step(next(given))
        barrier()
        times.append(1e3 * (time.perf_counter() - began))
    for batch in itertools.islice(given, 1):
        contender.step(batch)
    return times[uncounted:]


def barrier() -> None:
    """Wait for all ranks of this contender."""
    if dist.is_initialized():
        dist.barrier()
