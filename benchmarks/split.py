"""Where the time of our step goes: its phases, the bytes and collectives of each, and the time that the machine needs for the same.

The limit of a phase is the time, measured in the same run, of the least work that it stands for:

    ids out, vectors back, gradients back   an all-to-all of the same bytes, in equal shares (ids out: and an empty one for counts)
    lookup                                  gathering the same rows, and summing those of a segment
    combine                                 reading the segments and writing the outputs once, and the same on the way back
    update                                  gathering the distinct rows twice (read, write), and reading the gradients once
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import shardembed as se
from benchmarks import limits
from benchmarks.limits import Limits
from shardembed.planner.calibrate.stages import Runner, barrier, gathered, phases_of
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


def split(runner: Runner, machine: Limits) -> list[Phase]:
    """The phases of a step. Collective."""
    tally = se.Comm.of().tally
    runner.measure(1, warm=1)
    before_calls, before_bytes = tally.calls.copy(), tally.bytes.copy()
    taken = phases_of(gathered(runner.measure(STEPS, warm=0)))
    calls, sent = np.zeros(len(PHASES)), np.zeros(len(PHASES))
    for key, count in (tally.calls - before_calls).items():
        if key[1] == "benchmark barrier" or key[1] == "benchmark results":
            continue
        calls[_phase(key[1])] += count / STEPS
        sent[_phase(key[1])] += (tally.bytes[key] - before_bytes[key]) / STEPS
    sent = np.sum(gathered(sent), 0)
    least = floors(runner, machine, sent)
    middle = 1e3 * np.median(taken, 0)
    return [Phase(name, middle[i], least.get(i), sent[i], calls[i]) for i, name in enumerate(PHASES) if middle[i] > 0]


def _phase(stage: str) -> int:
    if stage.startswith("step") and "cop" in stage:
        return COPIES
    return next((phase for start, phase in BY_STAGE.items() if stage.startswith(start)), UPDATE)


def floors(runner: Runner, machine: Limits, sent: Any) -> dict[int, float]:
    """Milliseconds by phase, of the least work. Collective."""
    ranks = se.world_size()
    pairs = max(1, ranks * (ranks - 1))
    found = {phase: limits.exchange_seconds(int(sent[phase] / pairs)) for phase in (IDS, BACK, GRADS)}
    found[IDS] += machine.empty
    lookup = update = combined = 0.0
    ticket = runner.emb.prefetch(runner.batches[0]).ticket
    for i, (slab, asked) in enumerate(zip(runner.emb.journey.slabs, ticket.request, strict=True)):
        rows = slab.locate(asked.keys_E)
        distinct = rows.unique()
        bytes_a_row = slab.spec.width * slab.weights.element_size()
        lookup += limits.gather_seconds(slab.weights, rows, asked.offsets)
        segments = ticket.request.answers.totals[i]
        update += 2 * limits.gather_seconds(slab.weights, distinct) + segments * bytes_a_row / machine.copy
        combined += 2 * ticket.request.vectors.totals[i] * bytes_a_row / machine.copy
    with torch.no_grad():
        outputs = sum(output.numel() * output.element_size() for output in runner.emb(runner.batches[0]).values())
    found |= {LOOKUP: lookup, UPDATE: update, COMBINE: combined + 2 * outputs / machine.copy}
    barrier()
    slowest = np.max(gathered(np.array([found[phase] for phase in sorted(found)])), 0)
    return {phase: 1e3 * float(seconds) for phase, seconds in zip(sorted(found), slowest, strict=True) if ranks > 1 or seconds}


def total(phases: list[Phase]) -> tuple[float, float]:
    """(milliseconds of all phases that have a limit, their limits)."""
    known = [phase for phase in phases if phase.limit_ms]
    return sum(phase.ms for phase in known), sum(phase.limit_ms or 0.0 for phase in known)


def as_json(phases: list[Phase]) -> list[dict[str, Any]]:
    return [phase.__dict__ for phase in phases]
