"""Training steps of a workload under a plan, timed by the phases that the planner counts in.

The library is watched from outside: while steps are timed, the stages that `journey` calls are wrapped. Ranks leave a barrier
together, so times since then can be compared between ranks, whatever their clocks say. A phase ends when the last rank has ended
it, as in the planner's model, so the phases of a step add up to the step.

Legend: R ranks, P phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import shardembed as se
from shardembed.journey import journey
from shardembed.planner import popularity, traffic
from shardembed.planner.cost_phases import BACK, COMBINE, COPIES, GRADS, IDS, LOOKUP, PHASES, ROUTE, UPDATE
from shardembed.planner.workload import Counts, Reuse, TableLoad, Uniform, Workload, Zipf
from shardembed.tables.plan import Plan

Array = NDArray[np.float64]
WATCHED = ("send_ids", "send_back", "send_grads", "reduce_copies")


@dataclass(frozen=True)
class Case:
    """A workload under a plan.

    Attributes:
        name: what messages call it.
        workload: whose steps are timed.
        plan: that it is run under.
    """

    name: str
    workload: Workload
    plan: Plan


class Runner:
    """A case on this rank: its collection, and so many batches to step through."""

    def __init__(self, case: Case, batches: int, seed: int = 0) -> None:
        self.case = case
        comm = se.Comm.of()
        configs = [load.table for load in case.workload.tables]
        chosen = {load.table.name: load.optimizer for load in case.workload.tables}
        self.emb = se.EmbeddingCollection(configs, optimizer=chosen, plan=case.plan, wire_dtype=case.workload.wire_dtype)
        self.optimizer = se.Optimizer(self.emb)
        numbers = np.random.default_rng([seed, comm.rank])
        samples = case.workload.global_batch_size // comm.world_size
        self.batches = [batch_of(case.workload, samples, numbers) for _ in range(batches)]
        self._backward = Backward(join_small=False)
        self.number = 0

    def step(self) -> None:
        """Forward, backward from ready gradients of the outputs, and update."""
        batch = self.batches[self.number % len(self.batches)]
        self.number += 1
        self._backward([output for output in self.emb(batch).values() if output.requires_grad])
        self.optimizer.step()

    def measure(self, rounds: int, warm: int) -> Array:
        """`timed` steps of this case. Collective."""
        return timed(self.step, rounds, warm)


def timed(step: Callable[[], object], rounds: int, warm: int) -> Array:
    """When each phase of each step ended, in seconds since the ranks left a barrier, `[rounds, P + 1]`; the last line of a step is
    its end. Collective.
    """
    for _ in range(warm):
        step()
    barrier()
    began, ends = time.perf_counter(), []
    for _ in range(rounds):
        with watched() as marks:
            step()
            ends.append(_ends(marks, time.perf_counter()))
    return np.array(ends) - began


class Backward:
    """A backward from gradients of ones, which are ready before a step as long as the shapes stay.

    join_small: many small outputs are put side by side first, as a model would. Autograd's own checks of a gradient take 20
    microseconds, for a hundred tables as long as the whole step.
    """

    def __init__(self, join_small: bool = True) -> None:
        self._join = join_small
        self._grads: list[torch.Tensor] = []

    def __call__(self, outputs: list[torch.Tensor]) -> None:
        if self._join and sum(output.numel() for output in outputs) <= SMALL:
            samples = {output.shape[0] if output.dim() == 2 else -1 for output in outputs}
            whole = len(samples) == 1 and -1 not in samples
            outputs = [torch.cat(outputs, 1) if whole else torch.cat([output.flatten() for output in outputs])]
        if [grad.shape for grad in self._grads] != [output.shape for output in outputs]:
            self._grads = [torch.ones_like(output) for output in outputs]
        torch.autograd.backward(outputs, self._grads)


SMALL = 1 << 18  # elements


def barrier() -> None:
    """Wait for all ranks."""
    se.Comm.of().all_reduce("benchmark barrier", torch.zeros(1))


def gathered(array: Array) -> list[Array]:
    """The arrays of all ranks, which have one shape. Collective."""
    comm = se.Comm.of()
    sizes = [array.size] * comm.world_size
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1)).repeat(comm.world_size)
    received = comm.all_to_all("control", "benchmark results", flat, sizes, sizes)
    return [part.numpy().reshape(array.shape) for part in received.split(array.size)]


def in_turns(runners: Sequence[Runner], seconds: float, rounds: int = 2, visits: int = 3) -> list[Array]:
    """Phases of each runner's steps, `[steps, P]`: all take turns again and again, so that a noisy moment troubles all alike.

    Args:
        seconds: when to begin no new round of turns, but for the first `visits`. rounds: steps timed in a turn, after one that is
        not. Collective.
    """
    began, found = time.monotonic(), [[] for _ in runners]
    number = 0
    while True:
        # All ranks take as many turns: they decide by the clock of the slowest.
        late = max(float(other[0]) for other in gathered(np.array([time.monotonic() - began]))) * (number + 1) / max(1, number)
        if number >= visits and late > seconds:
            return [np.concatenate(each) for each in found]
        for runner, each in zip(runners, found, strict=True):
            each.append(phases_of(gathered(runner.measure(rounds, warm=1))))
        number += 1


@contextmanager
def watched() -> Iterator[dict[str, tuple[float, float]]]:
    """Notes when each stage of `journey` begins and ends."""
    marks: dict[str, tuple[float, float]] = {}
    originals = {name: getattr(journey, name) for name in WATCHED}

    def wrapped(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(stage)
        def run(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = stage(*arguments, **options)
            marks[name] = (began, time.perf_counter())
            return result

        return run

    for name, stage in originals.items():
        setattr(journey, name, wrapped(name, stage))
    try:
        yield marks
    finally:
        for name, stage in originals.items():
            setattr(journey, name, stage)


def _ends(marks: dict[str, tuple[float, float]], ended: float) -> list[float]:
    """In the order in which they happen: copies are summed in the middle of the update."""
    ids, back = marks["send_ids"], marks["send_back"]
    found = [ids[0], ids[1], back[0], back[1]]
    grads = marks.get("send_grads", (ended, ended))  # not there where nothing learns
    return [*found, *grads, *marks.get("reduce_copies", (grads[1], grads[1])), ended]


def phases_of(ends: Sequence[Array]) -> Array:
    """`[rounds, P]` seconds, from when each rank ended each phase."""
    # A phase ends when the slowest rank does: the exchange that follows waits for it.
    last = np.max(ends, 0)
    flat = np.diff(np.concatenate([[0.0], last.ravel()])).reshape(last.shape)
    found = np.zeros((len(last), len(PHASES)))
    order = (ROUTE, IDS, LOOKUP, BACK, COMBINE, GRADS, UPDATE, COPIES, UPDATE)
    for phase, column in zip(order, flat.T, strict=True):
        found[:, phase] += column
    return found


# Ids.


Draw = Callable[[TableLoad, int, np.random.Generator], NDArray[np.int64]]


def batch_of(workload: Workload, samples: int, numbers: np.random.Generator, draw: Draw | None = None) -> dict[str, Any]:
    """Ids of one rank's batch, by feature: `[samples, L]` where L is whole, else flat ids with offsets."""
    found: dict[str, Any] = {}
    drawn = draw or by_skew
    for load in workload.tables:
        for name, length in zip(load.table.feature_names or (), load.ids_per_sample, strict=True):
            if length == int(length):
                found[name] = torch.from_numpy(drawn(load, samples * int(length), numbers)).view(samples, int(length))
                continue
            lengths = np.floor(length) + (numbers.random(samples) < length % 1.0)
            offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
            found[name] = (torch.from_numpy(drawn(load, int(offsets[-1]), numbers)), torch.from_numpy(offsets))
    return found


def by_skew(load: TableLoad, count: int, numbers: np.random.Generator) -> NDArray[np.int64]:
    """Row numbers as the load's skew has them. Popular rows come first, or where the planner takes them to lie."""
    rows = load.table.num_embeddings
    if isinstance(load.skew, Uniform):
        return numbers.integers(0, rows, count)
    if isinstance(load.skew, Counts):
        shares = load.skew.counts.cumsum() / load.skew.counts.sum()
    elif isinstance(load.skew, Zipf):
        shares = _zipf(rows, load.skew.exponent)
    else:
        shares = _reuse(rows, load.skew, sum(load.ids_per_sample))
    found = np.searchsorted(shares, numbers.random(count)).clip(max=rows - 1)
    return found if load.order == "sorted" or isinstance(load.skew, Counts) else _places(rows)[found]


@cache
def _zipf(rows: int, exponent: float) -> Array:
    weights = np.arange(1, rows + 1, dtype=np.float64) ** -exponent
    return weights.cumsum() / weights.sum()


@cache
def _reuse(rows: int, reuse: Reuse, ids_per_sample: float) -> Array:
    """Shares of the ids, summed from the most popular row on, in a batch as large as the one that was counted."""
    counted = popularity.Batch(reuse.batch_size, reuse.batch_size * ids_per_sample, 1)
    weights = popularity.Observed(rows, reuse, counted).each(0, rows)[0]
    return weights.cumsum() / weights.sum()


@cache
def _places(rows: int) -> NDArray[np.int64]:
    """Row numbers from the most popular row on, in hashed order."""
    hot = traffic.hashed_places(rows, min(rows, traffic.HOT))
    return np.concatenate([hot, np.setdiff1d(np.arange(rows), hot)])
