"""Speeds of a machine from timed phases: which Ops and Links make the planner's own model say what was measured.

The model is linear in every number sought, so its design matrix is found by asking it: with one number at 1, all others at 0,
what does it say? A fit then is a least squares problem with no number below 0, in relative errors.

Legend: K unknowns, M measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from shardembed.planner.calibrate.stages import Case
from shardembed.planner.cost import CostModel, estimate
from shardembed.planner.cost_ops import OPS, OPTIMIZER_OPS
from shardembed.planner.cost_phases import PHASES
from shardembed.planner.topology import Link, Op, Topology
from shardembed.planner.topology_sections import optimizer_name

Array = NDArray[np.float64]
NOTHING = Op(0.0, 0.0, 0.0)
FREE = Link(float("inf"), 0.0)


@dataclass(frozen=True)
class Unknown:
    """One number of a topology.

    Attributes:
        op: the kind of work, or the link.
        field: of that: "call", "row" or "byte" of an op, "latency" or "byte" of the link.
    """

    op: str
    field: str


UNKNOWNS = (
    *(Unknown(op, field) for op in OPS for field in ("call", "row", "byte") if op not in ("update", "fused")),
    Unknown("intra", "latency"),
    Unknown("intra", "byte"),
)


def shape(blank: Topology) -> tuple[int, int, int]:
    """Of a design: P, R, K."""
    return len(PHASES), blank.ranks, len(UNKNOWNS)


def topology_of(blank: Topology, values: dict[Unknown, float]) -> Topology:
    """`blank` with these numbers."""
    ops: dict[str, dict[str, float]] = {}
    for unknown, value in values.items():
        if unknown.op != "intra":
            ops.setdefault(unknown.op, {"call": 0.0, "row": 0.0, "byte": 0.0})[unknown.field] = value
    byte = values.get(Unknown("intra", "byte"), 0.0)
    link = Link(1.0 / byte if byte else float("inf"), values.get(Unknown("intra", "latency"), 0.0))
    return replace(blank, intra=link, inter=link, ops={name: Op(**numbers) for name, numbers in ops.items()})


def design(case: Case, blank: Topology) -> Array:
    """`[P, R, K]`: what each unknown adds to each phase and rank."""
    zeros = dict.fromkeys(UNKNOWNS, 0.0)
    columns, tables = [], None
    used = {optimizer_name(type(load.optimizer)) for load in case.workload.tables}
    nothing = np.zeros((len(PHASES), blank.ranks))
    for unknown in UNKNOWNS:
        if unknown.op in OPTIMIZER_OPS and unknown.op.split("_", 1)[1] not in used:
            columns.append(nothing)
            continue
        topology = topology_of(blank, {**zeros, unknown: 1.0})
        model = CostModel(case.workload, topology, tables)
        tables = model.tables
        columns.append(estimate(case.plan, case.workload, topology, model).seconds)
    return np.stack(columns, 2)


def fit(
    designs: Sequence[Array],
    seconds: Sequence[Array],
    known: dict[Unknown, float] | None = None,
    floor: float = 0.05,
    rounds: int = 12,
) -> dict[Unknown, float]:
    """The unknowns that the measurements tell of.

    Errors are relative to a phase's seconds, those of phases below `floor` of their step to that. The busiest rank of a phase is
    the one that the last round's numbers make busiest. Lines far off lose weight (Huber).

    Args:
        designs: by case, `[P, R, K]`. seconds: by case, `[P]`. known: unknowns that are none: measured on their own.
    """
    known = known or {}
    given = np.array([known.get(unknown, 0.0) for unknown in UNKNOWNS])
    wanted = np.concatenate([each - (matrix @ given).max(1) for each, matrix in zip(seconds, designs, strict=True)])
    scale = np.concatenate([1.0 / np.maximum(each, floor * each.sum()) for each in seconds])
    seen = np.any([(matrix > 0).any((0, 1)) for matrix in designs], 0) & [unknown not in known for unknown in UNKNOWNS]
    groups = list(dict.fromkeys(map(_shared, UNKNOWNS)))
    group_of = np.array([groups.index(_shared(unknown)) for unknown in UNKNOWNS])
    together = (group_of[:, None] == np.arange(len(groups))) & seen[:, None]
    designs = [matrix @ together for matrix in designs]
    told = together.any(0)
    norms = np.sqrt(np.mean([(matrix**2).mean((0, 1)) for matrix in designs], 0))[told]
    # Every number alike important to begin with: which rank is the busiest depends on the numbers, and these on which it is.
    weights, values = np.ones(len(wanted)), 1.0 / norms
    for _ in range(rounds):
        lines = [_busiest(matrix[:, :, told], values) for matrix in designs]
        matrix = np.concatenate(lines) * scale[:, None]
        sizes = np.sqrt((matrix**2).sum(0))
        # Scaled columns, since a call takes 1e-5 seconds and a byte 1e-10; no number may be negative.
        solution, _ = nnls(matrix / sizes * weights[:, None], wanted * scale * weights)
        values = solution / sizes
        off = np.abs(matrix @ values - wanted * scale)
        limit = max(1e-9, 1.5 * float(np.median(off)))
        weights = np.sqrt(np.minimum(1.0, limit / np.maximum(off, 1e-12)))
    of_groups = np.zeros(len(groups))
    of_groups[told] = values
    found = zip(UNKNOWNS, of_groups[group_of].tolist(), seen, strict=True)
    return {**known, **{unknown: value for unknown, value, here in found if here}}


def _shared(unknown: Unknown) -> Unknown:
    """The unknown whose number it has. The updates of all optimizers have one price a call and one a row: they differ in what they
    compute for each column, and too few cases have each to tell more.
    """
    kind = unknown.op.split("_", 1)[0]
    return Unknown(kind, unknown.field) if unknown.op in OPTIMIZER_OPS and unknown.field != "byte" else unknown


def _busiest(matrix: Array, values: Array) -> Array:
    """`[P, K]`."""
    ranks = (matrix @ values).argmax(1)
    return matrix[np.arange(len(PHASES)), ranks]
