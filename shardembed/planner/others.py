"""Other starts for the search than what the relaxation chose.

The relaxation believes that every phase comes level. Where parts are about as large as a rank's share of a phase, ranks hold one or
two of them and wait for each other. Then a plan with finer parts, or with fewer, is better, though the relaxation has it dearer. So
the phase in which ranks wait longest is held to less seconds and to more, interval by interval, and the relaxation chooses again.
"""

from __future__ import annotations

import itertools

from shardembed.planner.bound import Bound
from shardembed.planner.highs import Effort
from shardembed.planner.problem import Score

STEP, FEWER, MORE = 1.25, 7, 3  # intervals of a phase's seconds, each so many times as long as the one before; below and above Z
MOST = 6  # starts


def others(bound: Bound, found: Score, effort: Effort) -> list[Bound]:
    """Starts, those first that would take least; none that would take longer than what was found does.

    found: a solution from the bound's own choice.
    """
    waits = found.loads.max(1) - found.loads.mean(1)
    phase = int(waits.argmax())
    target = float(bound.targets[phase])
    if target <= 0:
        return []
    edges = [target * STEP**power for power in range(-FEWER, MORE + 1)]
    starts = []
    for low, high in itertools.pairwise([0.0, *edges]):
        start = bound.relaxation.within(phase, low, high, effort)
        if start is not None and start.value is not None and start.value < found.step:
            starts.append((start.value, start))
    return [start for _, start in sorted(starts, key=lambda pair: pair[0])[:MOST]]
