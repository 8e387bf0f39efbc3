"""The phases of a step, the categories of memory, and the bytes that a shard takes of each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shardembed.planner import cost_demand as demands
from shardembed.planner.cost_demand import Demand, Table
from shardembed.planner.topology import Op

Array = NDArray[np.float64]
PHASES = ("route", "ids out", "lookup", "vectors back", "combine", "gradients back", "update", "reduce copies")
ROUTE, IDS, LOOKUP, BACK, COMBINE, GRADS, UPDATE, COPIES = range(len(PHASES))
CATEGORIES = ("weights", "optimizer state", "waiting gradients", "exchange buffers", "prefetch")
WEIGHTS, STATE, WAITING, BUFFERS, PREFETCH = range(len(CATEGORIES))


def phases_with(seconds: dict[int, float]) -> Array:
    """`[P]`: these phases' seconds, 0 elsewhere."""
    found = np.zeros(len(PHASES))
    for phase, number in seconds.items():
        found[phase] = number
    return found


def seconds_of(op: Op, rows: Array, row_bytes: Array | float) -> Array:
    """Of `rows` rows of `row_bytes` each; calls are counted elsewhere."""
    return rows * (op.row + op.byte * row_bytes)


def memory_of(table: Table, demand: Demand, widths: Array, rows: Array, keys: Array, vectors: Array) -> Array:
    """Bytes by category, `[n, C]`.

    waiting gradients: R S vectors in the compute dtype, R E row numbers and R S offsets in int64, and the merged gradients
    beside them while the step runs. exchange buffers: the looked-up vectors beside the message they are packed into, and the
    keys. prefetch: the next batch's keys.
    """
    found = np.zeros((len(CATEGORIES), len(widths)))
    found[WEIGHTS] = rows * widths * table.itemsize
    found[STATE] = rows * demands.slot_bytes(table, widths)
    requests = table.ranks * (keys + np.where(demand.lengths > 0, demand.segments, 0.0) * demands.ID_BYTES)
    if table.learns:
        numbers = table.ranks * (demand.entries + demand.lengths) * demands.ID_BYTES
        merged = demand.touched * (widths * table.compute + demands.ID_BYTES)
        found[WAITING] = table.ranks * demand.segments * widths * table.compute + numbers + merged
    found[BUFFERS] = table.ranks * (vectors + demand.segments * widths * table.itemsize) + requests
    found[PREFETCH] = requests
    return found.T
