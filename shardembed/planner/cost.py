"""A plan counted from its shards: the same functions that options are made of, added up over whatever the plan holds.

The model itself is in `cost_model`, kinds of work in `cost_ops`, byte counts in `cost_demand`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from shardembed.errors import PlanError
from shardembed.planner.cost_copies import paid
from shardembed.planner.cost_demand import Holdings, Table
from shardembed.planner.cost_model import CostModel
from shardembed.planner.cost_phases import BACK, CATEGORIES, COPIES, GRADS, IDS, PHASES, STATE, UPDATE, WEIGHTS
from shardembed.planner.result import Estimate
from shardembed.planner.topology import Topology
from shardembed.planner.traffic import Asked
from shardembed.planner.workload import Workload
from shardembed.tables.plan import Plan, TablePlan
from shardembed.wire.header import HEADER_BYTES, SLAB_COUNTS_BYTES

Array = NDArray[np.float64]


def estimate(plan: Plan, workload: Workload, topology: Topology, model: CostModel | None = None) -> Estimate:
    """The cost of `plan`.

    Args:
        model: of the same workload and topology, where the caller has one.

    Raises:
        PlanError: the plan is for other tables or ranks.
    """
    model = model or CostModel(workload, topology)
    _check(plan, workload, topology)
    one_slab = all(len(table.layout.strips) == 1 and not table.layout.copied for table in plan.tables)
    copied = [number for number, table in enumerate(plan.tables) if table.layout.copied and topology.ranks > 1]
    count = _Count(model, not (model.one_slab and one_slab), [model.tables[number] for number in copied])
    for number, table in enumerate(plan.tables):
        if number in copied:
            count.copied(number)
        else:
            count.cut(number, table)
    return count.total()


def _check(plan: Plan, workload: Workload, topology: Topology) -> None:
    if plan.world_size != topology.ranks:
        raise PlanError(f"the plan is for {plan.world_size} rank(s), the topology has {topology.ranks}; make a plan for it")
    wanted = [(load.table.name, load.table.cut_rows, load.table.embedding_dim) for load in workload.tables]
    given = [(table.name, table.num_embeddings, table.embedding_dim) for table in plan.tables]
    for want, have in zip([*wanted, ("nothing", 0, 0)], [*given, ("nothing", 0, 0)], strict=False):
        if want != have:
            raise PlanError(
                f"the plan has {have} where the workload has {want} (name, rows, columns); make a plan for this workload"
            )


class _Count:
    """Sums by rank, filled table by table."""

    def __init__(self, model: CostModel, packed: bool, copies: Sequence[Table]) -> None:
        """packed: vectors are copied into messages of several slabs, and out of them. copies: all tables that are copied."""
        self.packed, self.copies = packed, copies
        self.shared = model.copies.shared(copies)
        ranks, tables = model.ranks, len(model.tables)
        self.model = model
        self.seconds = np.repeat(model.base[:, None], ranks, 1)
        self.memory = np.zeros((len(CATEGORIES), ranks))
        self.table_seconds = np.zeros((tables, len(PHASES)))
        self.table_memory = np.zeros((tables, ranks))
        # One rank's request to each rank, its vectors back, and what twins send.
        self.keys, self.vectors, self.grads, self.twins = (np.zeros(ranks) for _ in range(4))
        self.charges: set[str] = set()

    def copied(self, table: int) -> None:
        loads, memory = self.model.copied_in_detail(table, self.packed, self.shared)
        self._everywhere(table, loads, memory)
        self.table_memory[table] += memory[WEIGHTS] + memory[STATE]
        self.charges |= self.model.charges_of(table, [self.model.tables[table].width], "copied")

    def cut(self, table: int, plan: TablePlan) -> None:
        model, known = self.model, {}
        strips: list[tuple[float, Asked]] = []
        for strip in plan.layout.strips:
            rows = tuple(block.rows for block in strip.blocks)
            asked = known.get(rows)
            if asked is None:
                asked = known[rows] = model.tables[table].asked_of(rows)
            width, held = float(len(strip.columns)), Holdings.of(strip, asked, model.tables[table].bucket_rows)
            strips.append((width, held.asked))
            self._owners(table, plan, width, held)
        self._everywhere(table, *model.common_in_detail(table, strips, plan.packing, self.packed))
        self.charges |= model.charges_of(table, [width for width, _ in strips], plan.packing)

    def _owners(self, table: int, plan: TablePlan, width: float, held: Holdings) -> None:
        ranks, widths = held.ranks, np.full(len(held.ranks), width)
        loads, memory = self.model.parts_in_detail(table, widths, held.asked, held.rows, plan.packing, self.packed)
        self.seconds[:, ranks] += loads.T
        self.memory[:, ranks] += memory.T
        self.table_seconds[table] += loads.sum(0)
        self.table_memory[table, ranks] += memory[:, WEIGHTS] + memory[:, STATE]
        this = self.model.tables[table]
        demand = this.demand(held.asked, plan.packing)
        vectors = this.vector_bytes(demand, widths)
        self.keys[ranks] += this.key_bytes(demand, held.rows)
        self.vectors[ranks] += vectors
        if this.learns:
            self.grads[ranks] += vectors
            if this.twins:
                self.twins[ranks] += this.swapped_bytes(demand, widths)

    def _everywhere(self, table: int, loads: Array, memory: Array) -> None:
        self.seconds += loads[:, None]
        self.memory += memory[:, None]
        self.table_seconds[table] += self.model.ranks * loads

    def total(self) -> Estimate:
        if "slabs" in self.charges:  # whose copies have been counted
            self.charges = self.charges - {"slabs"} | {"packed slabs"}
        self.charges = paid(self.charges, self.shared)
        # In one order, so that the same plan gives the same bits.
        for name in sorted(self.charges):
            self.seconds += self.model.charges[name][:, None]
        return Estimate(PHASES, self.seconds, self._bytes(), CATEGORIES, self.memory, self.table_seconds, self.table_memory)

    def _bytes(self) -> Array:
        """What each rank sends to others: of keys and gradients what it asks of them, of vectors what they ask of it."""
        others = self.model.ranks - 1
        sent = np.zeros((len(PHASES), self.model.ranks))
        slabs = [name for name in self.charges if name.startswith("slab:")]
        sent[IDS] = others * (HEADER_BYTES + SLAB_COUNTS_BYTES * len(slabs)) + self.keys.sum() - self.keys
        sent[BACK] = others * self.vectors
        sent[GRADS] = self.grads.sum() - self.grads
        sent[UPDATE] = self.twins
        sent[COPIES] = self.model.copies.sent(self.copies, self.shared)
        return sent
