"""The whole step and an epoch of such steps, as predictions: the tables of a plan, and the dense part of the model around them.

The planner cuts tables and knows nothing of the rest. What it is told of the rest (`Dense`) is added up here, and changes no plan:

    dense part     samples of a rank x seconds a sample
    its gradients  an all-reduce of 4 bytes a parameter (`cost_ops.all_reduce`)
    whole step     tables + dense part + its gradients: nothing overlaps
    an epoch       ceil(samples / batch) such steps
    its cost       ranks x hours x the price of a rank's hour
"""

from __future__ import annotations

from dataclasses import dataclass

from shardembed.planner import words
from shardembed.planner.dense import NUMBER, Dense
from shardembed.planner.result import Planned

HOUR = 3600.0
ASK = (
    "Of the tables alone. With --dense-ms and --dense-parameters the dense part of the model is in it, with --samples the hours "
    "an epoch takes, with --cost-per-hour what these cost."
)


@dataclass(frozen=True)
class Whole:
    """A step and an epoch, all of it predicted. What nobody has said is left out: 0 seconds, or None.

    Attributes:
        tables: seconds of a step.
        dense: seconds of a step.
        reduced: seconds in which dense gradients are summed.
        memory: bytes of the dense part on every rank.
        steps: of an epoch.
        hours: of an epoch.
        cost: of an epoch, in the currency of the price.
    """

    tables: float
    dense: float
    reduced: float
    memory: int
    steps: int | None
    hours: float | None
    cost: float | None

    @property
    def step(self) -> float:
        """Seconds of it all, one after the other."""
        return self.tables + self.dense + self.reduced


def of(planned: Planned, price: float | None = None) -> Whole:
    """price: of an hour of one rank."""
    workload, topology = planned.workload, planned.topology
    dense, batch, tables = workload.dense or Dense(), workload.global_batch_size, planned.estimate.step_seconds
    found = Whole(tables, dense.seconds(topology, batch), dense.reduced(topology), dense.memory, None, None, None)
    if workload.samples is None:
        return found
    steps = -(-workload.samples // batch)
    hours = steps * found.step / HOUR
    cost = None if price is None else price * topology.ranks * hours
    return Whole(tables, found.dense, found.reduced, found.memory, steps, hours, cost)


def lines(planned: Planned, price: float | None = None) -> list[tuple[str, str, str]]:
    """(name, value, more about it) of what was told of the rest of the model and of an epoch; none where nothing was."""
    whole, workload, topology = of(planned, price), planned.workload, planned.topology
    batch, found = workload.global_batch_size, []
    if whole.dense:
        samples = f"{words.number(batch / topology.ranks)} samples of a rank, forward, backward and update"
        found.append(("dense part", words.duration(whole.dense), f"predicted; {samples}"))
    if whole.reduced:
        sent = words.size(NUMBER * (workload.dense or Dense()).parameters)
        found.append(("its gradients", words.duration(whole.reduced), f"predicted; {sent} are summed over the ranks"))
    if found:
        rate = words.number(batch / whole.step)
        found.append(("whole step", words.duration(whole.step), f"predicted, if nothing overlaps; {rate} samples a second"))
    if whole.memory:
        kept = words.size(topology.reserve)
        over = " and is more than" if whole.memory > topology.reserve else ", of"
        found.append(("dense memory", words.size(whole.memory), f"of every rank, without activations{over} the {kept} kept for it"))
    if whole.hours is not None and whole.steps is not None:
        told = "" if whole.dense else ", of the tables alone"
        found.append(("an epoch", duration(whole.hours), f"predicted{told}; {words.plural(whole.steps, 'step')}"))
    if whole.cost is not None and price is not None:
        found.append(
            ("its cost", money(whole.cost), f"predicted; {words.plural(topology.ranks, 'rank')} at {money(price)} an hour each")
        )
    return found


def duration(hours: float) -> str:
    """Of an epoch, in hours; what is shorter than one in minutes or seconds."""
    if hours >= 0.995:
        return f"{hours:.2f} h" if hours < 9.995 else f"{words.number(hours)} h"
    return f"{60 * hours:.1f} min" if hours >= 1 / 60 else words.duration(hours * HOUR)


def money(value: float) -> str:
    """In whatever currency: two places, or three digits where it is little."""
    return f"{value:,.2f}" if value >= 0.995 or value == 0 else f"{value:.3g}"


def as_json(planned: Planned, price: float | None = None) -> dict[str, float | int | None]:
    """What a script would read; null where nobody said what it takes."""
    whole = of(planned, price)
    return {
        "dense_seconds": whole.dense,
        "dense_reduce_seconds": whole.reduced,
        "dense_memory_bytes": whole.memory,
        "whole_step_seconds": whole.step,
        "epoch_steps": whole.steps,
        "epoch_hours": whole.hours,
        "epoch_cost": whole.cost,
    }
