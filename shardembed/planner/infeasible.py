"""Why no plan fits, as a proof, and the smallest changes that would make room."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from shardembed.planner import cost_demand as demands
from shardembed.planner.cost_model import CostModel
from shardembed.planner.cuts import Cut
from shardembed.planner.highs import TRIAL
from shardembed.planner.needs import Need, needs, smallest, together, whole
from shardembed.planner.packed import packed
from shardembed.planner.problem import Option, Problem
from shardembed.planner.remedies import SHOWN, Trials, gib, wish
from shardembed.planner.space import Space
from shardembed.tables.plan import TablePlan


def explain(model: CostModel, space: Space, problem: Problem) -> str:
    """The message of the error."""
    full = whole(space, problem)
    found = needs(full)
    topology = model.topology
    room = f"{problem.ranks} rank(s) with {gib(problem.capacity)} each"
    kept = [(topology.reserve, "in reserve"), (topology.communicators, "of communicators")]
    if topology.room < topology.memory:
        room += f" ({gib(topology.memory)} less {' and '.join(f'{gib(bytes_)} {what}' for bytes_, what in kept if bytes_)})"
    binding = next((need for need in found if need.least > problem.capacity), None)
    proved = binding is not None or packed(full, TRIAL).impossible
    head = (
        "no plan fits into memory"
        if proved
        else "no plan was found that fits into memory, though nothing proves that there is none"
    )
    lines = [f"{head}: {room}.", *_Proof(model, space, full).lines(binding, proved)]
    trials = Trials(model.workload, topology, space.constraints)
    largest = (binding or found[0]).items[0] if binding is None or binding.kind != "rank" else found[0].items[0]
    changes = list(trials.constraint())
    changes += trials.all(max(need.least for need in found), full, largest)
    if changes:
        lines += ["Each of these changes alone makes room; a plan was found with it:", *(f"  - {change}" for change in changes)]
    return "\n".join(lines)


class _Proof:
    def __init__(self, model: CostModel, space: Space, problem: Problem) -> None:
        self.model, self.space, self.problem = model, space, problem

    def lines(self, binding: Need | None, proved: bool) -> Iterator[str]:
        if binding is None:
            all_ = gib(together(self.problem, self.problem.capacity).least)
            yield f"Every table fits by itself, and all together need {all_} of every rank; but parts are whole, and pins hold."
            if proved:
                yield "An integer program over all places of all parts has no solution, by HiGHS."
            return
        yield from {"table": self._table, "crowd": self._crowd, "rank": self._rank, "total": self._total}[binding.kind](binding)

    def _table(self, need: Need) -> Iterator[str]:
        number = need.items[0]
        option = smallest(self.problem.items[number].options, self.problem.ranks)
        yield f"Table {self._name(number)} alone does not: {self._size(number)}."
        least = f"{gib(need.least)} on some rank{self._pinned(number)}"
        yield f"Of the layouts it may have, {_layout(option)} needs the least, and that is {least}."

    def _crowd(self, need: Need) -> Iterator[str]:
        ranks, each = self.problem.ranks, need.each
        yield (
            f"{len(need.items)} tables have a part of more than 1/{each + 1} of a rank in every layout they may have "
            f"({self._listed(need)}), so that each of {ranks} rank(s) holds {each} of them at most."
        )

    def _rank(self, need: Need) -> Iterator[str]:
        pinned = sum(size > need.least / 1000 for size in need.bytes)  # others leave something on every rank
        listed = self._listed(replace(need, items=need.items[:pinned]))
        yield f"Rank {need.rank} needs {gib(need.least)} at least, for what is pinned there: {listed}."

    def _total(self, need: Need) -> Iterator[str]:
        capacity, ranks = self.problem.capacity, self.problem.ranks
        need = together(self.problem, capacity)
        weights = sum(self._weights(number) for number in need.items)
        state = sum(self._state(number) for number in need.items)
        yield (
            f"All tables together need {gib(need.least * ranks)}, each in the smallest layout it may have; the ranks have "
            f"{gib(capacity * ranks)} together."
        )
        rest = need.least * ranks - weights - state
        yield f"That is {gib(weights)} of weights, {gib(state)} of optimizer state, {gib(rest)} of gradients, buffers and copies."
        yield f"The largest over all ranks: {self._listed(need, ranks)}."

    def _listed(self, need: Need, times: int = 1) -> str:
        said = [f"{self._name(item)} {gib(times * size)}" for item, size in zip(need.items[:SHOWN], need.bytes, strict=False)]
        return ", ".join(said) + (f" and {len(need.items) - SHOWN} more" if len(need.items) > SHOWN else "")

    def _name(self, number: int) -> str:
        return repr(self.problem.items[number].name)

    def _size(self, number: int) -> str:
        load = self.model.tables[number].load
        held = f"{gib(self._weights(number))} of weights and {gib(self._state(number))} of state"
        return f"{load.rows:,} x {load.table.embedding_dim}, {held}"

    def _weights(self, number: int) -> float:
        table = self.model.tables[number]
        return float(table.held_rows * table.width * table.itemsize)

    def _state(self, number: int) -> float:
        table = self.model.tables[number]
        return float(table.held_rows * demands.slot_bytes(table, np.array([float(table.width)]))[0])

    def _pinned(self, number: int) -> str:
        pin = self.space.constraints.pins.get(self.problem.items[number].name)
        return f" (it is pinned: {wish(pin)})" if pin is not None else ""


def _layout(option: Option) -> str:
    key = option.key
    if isinstance(key, TablePlan):
        return f"the {key.kind} layout that is given"
    assert isinstance(key, Cut)
    if option.divisible:
        return "row_wise over all ranks"
    return f"{key.kind} in {option.parts} part(s), packing {key.packing}" if option.parts else key.kind
