"""What it costs that copies share their gradients: `store.reductions` as the planner counts it.

    way     on every rank, a table of T rows, U of them touched by a rank's batch and V by all, W columns    a plan, once
    whole   dense of T rows; all-reduce of T x (W + 1)                                                       all-reduce's latency
    rows    copy and all-to-all of R U rows and their numbers; merge of R U rows into V                      all-to-all's latency

Which way a plan goes hangs on all its copies together, by bytes (`Copies.shared`), and so does not add up from tables. What an
option carries is the lesser of both ways, table by table, and so no more than any plan with it pays: sums of lesser ones are never
above the lesser of two sums. `cost.estimate`, which sees the plan, counts the way that the plan goes. Where copies take
`COUNTED_BYTES`, ranks tell each other beforehand how many rows they have; where all tables together do not, no copy goes by rows.

A plan follows the fullest rank, of which the expected rank stands here. Memory is that of the whole tables either way, so that it
adds up: rows that a rank puts together take less, by the rule, though as many more may arrive beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shardembed.planner import cost_demand as demands
from shardembed.planner.cost_demand import INT32_MAX, Demand, Table
from shardembed.planner.cost_ops import Exchange
from shardembed.planner.cost_phases import BUFFERS, CATEGORIES, STATE, WAITING, WEIGHTS
from shardembed.planner.topology import Op

Array = NDArray[np.float64]
Way = Literal["whole", "rows"]
WAYS: tuple[Way, ...] = ("whole", "rows")
# Of what may not be imported here; a test holds them together.
TAG_ELEMENTS = 8  # `comm.tag.TAG`
COUNTED_BYTES = 1 << 18  # `store.reductions.COUNTED`
COUNTS_OPENING, COUNTS_ROW = 2, 32  # of int64 numbers in `comm.sharing.share`, and what their number is a multiple of


@dataclass(frozen=True)
class Shared:
    """How a plan's copies share their gradients.

    Attributes:
        way: all of them.
        item: bytes of a number, the widest of the tables' own.
        counted: ranks exchange their numbers of rows before.
    """

    way: Way
    item: int
    counted: bool


@dataclass(frozen=True)
class Copies:
    """Prices of sharing, from a topology's speeds.

    Attributes:
        ways: that some plan goes.
        ranks: of the job.
        op: the speed of a kind of work.
        exchange: an all-to-all.
        reduce: an all-reduce.
    """

    ways: tuple[Way, ...]
    ranks: int
    op: Callable[[str], Op]
    exchange: Exchange
    reduce: Exchange

    @staticmethod
    def of(tables: Sequence[Table], ranks: int, op: Callable[[str], Op], exchange: Exchange, reduce: Exchange) -> Copies:
        """tables: all that a plan may copy."""
        copies = Copies(WAYS, ranks, op, exchange, reduce)
        return copies if copies.shared(tables).counted else replace(copies, ways=("whole",))

    def shared(self, tables: Sequence[Table]) -> Shared:
        """How these go, all tables of a plan that are copied: the rule of `store.reductions.sum_over_ranks`."""
        tables = [table for table in tables if table.learns]
        item = max((table.compute for table in tables), default=4)
        whole, rows = (sum(self.buffer(table, way, item) for table in tables) for way in WAYS)
        counted = whole >= COUNTED_BYTES
        return Shared("rows" if counted and rows < whole else "whole", item, counted)

    def buffer(self, table: Table, way: Way, item: int) -> float:
        """Bytes that a rank puts together for a table: its picture with a column of touches, or a message to every rank."""
        if not table.learns:
            return 0.0
        return table.rows * (table.width + 1) * item if way == "whole" else self.ranks * self.message(table, item)

    def message(self, table: Table, item: int) -> float:
        """Bytes of the rows that a rank touches, and of their numbers. These are as wide as an element where that holds them."""
        key = 4 + 4 * (table.rows > INT32_MAX) if item == 4 else 8
        return table.traffic.distinct * (table.width * item + key)

    def sent(self, tables: Sequence[Table], shared: Shared) -> float:
        """Bytes that a rank sends to others for all copies that learn; of an all-reduce, along a ring."""
        tables, others = [table for table in tables if table.learns], self.ranks - 1
        if not tables:
            return 0.0
        counts = others * 8 * COUNTS_ROW * -(-(COUNTS_OPENING + len({t.slab(t.width, True, False) for t in tables})) // COUNTS_ROW)
        if shared.way == "rows":
            return counts + others * sum(self.message(table, shared.item) for table in tables)
        buffer = sum(self.buffer(table, "whole", shared.item) for table in tables) + TAG_ELEMENTS * shared.item
        return counts * shared.counted + 2 * others / self.ranks * buffer

    def seconds(self, table: Table, shared: Shared | None = None) -> float:
        """Of a table that learns; without `shared`, the least that it may take."""
        if shared is None:
            return reduce(np.minimum, [self._seconds(table, way, table.compute) for way in self.ways])
        return self._seconds(table, shared.way, shared.item)

    def _seconds(self, table: Table, way: Way, item: int) -> float:
        if way == "whole":
            buffer = self.buffer(table, way, item)
            return self.op("dense").seconds(0, table.rows, buffer) + buffer * (self.reduce.byte + self.op("all_reduce").byte)
        message, distinct = self.message(table, item), self.ranks * table.traffic.distinct
        # Put together for every rank, and taken apart by slab.
        moved = 2 * self.ranks * message * self.op("copy").byte + message * self.exchange.byte
        return moved + self.op("merge").seconds(0, distinct, (distinct + table.traffic.touched) * table.width * item)

    # What a plan pays once.

    def once(self) -> dict[str, float]:
        """Seconds by name: of sharing the least, and each way; of the counts, and what is certain with them beyond the least."""
        whole = self.reduce.latency + TAG_ELEMENTS * 4 * (self.reduce.byte + self.op("all_reduce").byte)
        rows, counts = self.exchange.latency, self.exchange.latency + self.exchange.byte * 8 * COUNTS_ROW
        least = min(whole, counts + rows) if "rows" in self.ways else whole
        beyond = counts + min(whole, rows) - least
        return {"copied": least, "copied, whole": whole, "copied, rows": rows, "counted": counts, "counted at least": beyond}

    def a_slab(self, slab: str) -> dict[str, float]:
        """Likewise of each copied slab."""
        calls = {"whole": self.op("dense").call, "rows": self.op("merge").call}
        return {f"copied {slab}": min(calls[way] for way in self.ways)} | {f"copied {slab}, {way}": calls[way] for way in WAYS}

    def names(self, table: Table, slab: str) -> set[str]:
        """Charges of a plan with a copy of this table, at least."""
        if not table.learns:
            return set()
        counted = np.all(np.asarray(self.buffer(table, "whole", table.compute)) >= COUNTED_BYTES)
        return {"copied", f"copied {slab}"} | ({"counted at least"} if counted else set())


def paid(names: set[str], shared: Shared) -> set[str]:
    """The charges of a plan that goes this way, of those that its options have."""
    found = {f"{name}, {shared.way}" if name.startswith("copied") else name for name in names - {"counted at least"}}
    return found | ({"counted"} if shared.counted else set())


def memory_of(table: Table, whole: Demand) -> Array:
    """Bytes of a copy by category, `[C, ...]`, but those of messages to be read by a strip. whole: what a rank asks of all rows."""
    rows, widths = table.rows * 1.0, np.array([float(table.width)])
    found, bagged = whole.segments[0], whole.bagged[0]
    memory = np.zeros((len(CATEGORIES), *np.shape(table.traffic.ids)))
    memory[WEIGHTS] += rows * table.width * table.itemsize
    memory[STATE] += rows * float(demands.state_bytes(table, widths)[0])
    memory[BUFFERS] += found * table.width * table.itemsize
    if table.learns:
        gradients = table.width * table.compute + demands.ID_BYTES
        memory[WAITING] += (found + table.traffic.touched) * gradients + bagged * demands.ID_BYTES
        memory[BUFFERS] += rows * (table.width + 1) * table.compute
    return memory
