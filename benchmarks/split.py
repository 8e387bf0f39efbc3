"""Where the time of our step goes: its phases, the bytes and collectives of each, and the time that the machine needs for the same.

The limit of a phase is the time, measured in the same run, of the least work that it stands for:

    ids out, vectors back, gradients back   an all-to-all of the same bytes, in equal shares (ids out: and an empty one for counts)
    lookup                                  gathering the same rows, and summing those of a segment
    combine                                 reading the segments and writing the outputs once, and the same on the way back
    update                                  gathering the distinct rows twice (read, write), and reading the gradients once
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch

import shardembed as se
from benchmarks import limits
from benchmarks.crew import Contender
from benchmarks.limits import Limits
from shardembed.planner.calibrate.stages import barrier, gathered, phases_of, timed
from shardembed.planner.cost_phases import BACK, COMBINE, COPIES, GRADS, IDS, LOOKUP, PHASES, UPDATE

BY_STAGE = {  # the beginning of a collective's stage, and the phase that it belongs to
    "forward: counts": IDS,
    "forward: send ids": IDS,
    "forward: send back": BACK,
    "backward": GRADS,
}
STEPS = 12


@dataclass(frozen=True)
class Phase:
    """ms: median on the slowest rank. limit_ms: what the machine needs, or None where nobody knows the least. sent: bytes of all
    ranks; calls: collectives, in a step.
    """

    name: str
    ms: float
    limit_ms: float | None
    sent: float
    calls: float


def measured(ours: Contender) -> dict[str, Any]:
    """The phases of our step, the machine's limits, and how many tables are packed in which way. Collective."""
    machine = limits.measure(max(spec.width for spec in ours.emb.journey.specs))
    packings = Counter(table.packing for table in ours.emb.plan.tables)
    return {"limits": machine.__dict__, "phases": [phase.__dict__ for phase in split(ours, machine)], "packings": packings}


def split(ours: Contender, machine: Limits) -> list[Phase]:
    """The phases of a step. Collective."""
    tally, batches = se.Comm.of().tally, cycle(ours.batches)
    timed(lambda: ours.step(next(batches)), 1, warm=1)
    before_calls, before_bytes = tally.calls.copy(), tally.bytes.copy()
    taken = phases_of(gathered(timed(lambda: ours.step(next(batches)), STEPS, warm=0)))
    calls, sent = np.zeros(len(PHASES)), np.zeros(len(PHASES))
    for key, count in (tally.calls - before_calls).items():
        if key[1] == "benchmark barrier" or key[1] == "benchmark results":
            continue
        calls[_phase(key[1])] += count / STEPS
        sent[_phase(key[1])] += (tally.bytes[key] - before_bytes[key]) / STEPS
    sent = np.sum(gathered(sent), 0)
    least = floors(ours, machine, sent)
    middle = 1e3 * np.median(taken, 0)
    return [Phase(name, middle[i], least.get(i), sent[i], calls[i]) for i, name in enumerate(PHASES) if middle[i] > 0]


def _phase(stage: str) -> int:
    if stage.startswith("step") and "cop" in stage:
        return COPIES
    return next((phase for start, phase in BY_STAGE.items() if stage.startswith(start)), UPDATE)


def floors(ours: Contender, machine: Limits, sent: Any) -> dict[int, float]:
    """Milliseconds by phase, of the least work. Collective."""
    ranks = se.world_size()
    pairs = max(1, ranks * (ranks - 1))
    found = {phase: limits.exchange_seconds(int(sent[phase] / pairs)) for phase in (IDS, BACK, GRADS)}
    found[IDS] += machine.empty
    lookup = update = combined = 0.0
    emb, batch = ours.emb, ours.batches[0]
    ticket = emb.prefetch(batch).ticket
    for i, (slab, asked) in enumerate(zip(emb.journey.slabs, ticket.request, strict=True)):
        rows = slab.locate(asked.keys_E, learning=False)
        distinct = rows.unique()
        bytes_a_row = slab.spec.width * slab.weights.element_size()
        lookup += limits.gather_seconds(slab.weights, rows, asked.offsets)
        segments = ticket.request.answers.totals[i]
        update += 2 * limits.gather_seconds(slab.weights, distinct) + segments * bytes_a_row / machine.copy
        combined += 2 * ticket.request.vectors.totals[i] * bytes_a_row / machine.copy
    with torch.no_grad():
        outputs = sum(output.numel() * output.element_size() for output in emb(batch).values())
    found |= {LOOKUP: lookup, UPDATE: update, COMBINE: combined + 2 * outputs / machine.copy}
    barrier()
    slowest = np.max(gathered(np.array([found[phase] for phase in sorted(found)])), 0)
    return {phase: 1e3 * float(seconds) for phase, seconds in zip(sorted(found), slowest, strict=True) if ranks > 1 or seconds}
