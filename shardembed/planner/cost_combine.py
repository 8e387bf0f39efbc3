"""What a rank does with the vectors that came back, and with the gradients of what it made of them: the phase `combine`, there and
back. The planner's mirror of `journey.route.combine` and `journey.route.side_by_side`.

Vectors of a slab that pool alike are a group, pooled in one call into one piece. Pieces of features that pool are put side by side
in one tensor, unless there is but one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

from shardembed.planner.cost_demand import Table
from shardembed.planner.topology import Op
from shardembed.tables.placement import Packing
from shardembed.tables.pooling import POOLINGS, OverIds, Pooling, PoolingKind

# What `combine` does with vectors that came one an id, and what its adjoint does; one op is both ways.
BY_ID: dict[OverIds, tuple[str, ...]] = {
    "sum": ("pool", "pool_adjoint"),
    "mean": ("pool", "pool_adjoint"),
    "max": ("pool_max",),
    None: ("gather", "gather_adjoint"),
}
BY_BAG = ("pool", "pool_adjoint")
Group = Pooling | Literal["bags"]  # what `combine` does in one call for all tables of a slab that are alike in it


class Combining:
    """The cost of outputs. Where a plan puts all tables into one slab is not known here: see `cost_model`.

    Attributes:
        op: the speed of a kind of work.
        pieces: whether outputs come in several pieces under any plan, so that they have to be put side by side.
    """

    def __init__(self, tables: Sequence[Table], op: Callable[[str], Op]) -> None:
        poolings: dict[object, set[Pooling]] = defaultdict(set)
        for table in tables:
            poolings[table.kind].update(table.poolings)
        self._groups = {kind: len(found) for kind, found in poolings.items()}
        self.op = op
        dtypes = {table.load.table.dtype for table in tables if set(table.poolings) - {None}}
        self._alike = len(dtypes) == 1  # else each output is a tensor of its own
        self.pieces = self._alike and sum(len(found - {None}) for found in poolings.values()) > 1

    def call(self, table: Table, group: Group) -> float:
        """Seconds of a group's calls, there and back."""
        ops = BY_BAG if group == "bags" else BY_ID[POOLINGS[group].over_ids]
        return sum(self.op(name).call for name in (ops if table.learns else ops[:1]))

    def pool(self, table: Table, feature: int, segments: float, width: float) -> float:
        """Seconds of one strip of a feature that is read by id. There, the vectors of all ids are read and the outputs written;
        back, gradients of outputs are read for all ids and those of segments written.
        """
        ids, row, kind = table.feature_ids(feature), width * table.compute, POOLINGS[table.poolings[feature]]
        outputs, (there, *back) = outputs_of(table, feature), BY_ID[kind.over_ids]
        if not back:
            read = self.op("pool").seconds(0, ids, ids * row)
            return read + self.op(there).seconds(0, ids, outputs * row)
        seconds = self.op(there).seconds(0, ids, (ids + outputs) * row)
        if table.learns:
            # Torch's own adjoint, where `combine` has none: of bags with padding too.
            own = kind.over_ids is not None and table.load.table.padding_idx is None
            # Each group's adjoint writes gradients of all segments of the slab, and they are added up.
            written = segments * (2 * self._groups[table.kind] - 1)
            seconds += self.op(back[0] if own else "gather_adjoint").seconds(0, ids, (ids + written) * row)
        return seconds + self._divided(kind, outputs * row) * (2 if kind.divides_ids else 1)

    def pool_sums(self, table: Table, feature: int, sums: float, width: float) -> float:
        """As `pool`, where the owners have summed already: each of their sums is read once and belongs to one bag."""
        bags, row = table.traffic.bags[feature], width * table.compute
        seconds = self.op("pool").seconds(0, sums, (sums + bags) * row)
        if table.learns:
            seconds += self.op("pool_adjoint").seconds(0, sums, 2 * sums * row)
        return seconds + self._divided(POOLINGS[table.poolings[feature]], bags * row)

    def _divided(self, kind: PoolingKind, written: float) -> float:
        """Of what is divided by something of the bag, each byte is read and written once more."""
        return 0.0 if kind.divisor is None else self.op("copy").byte * 2 * written

    def join(self, table: Table, strips: int) -> float:
        """Seconds of putting strips and pieces side by side, and of taking their gradients apart, where there are several pieces in
        any case: those of one alone are `rejoined`.
        """
        seconds = 0.0
        for feature, pooling in enumerate(table.poolings):
            outputs = outputs_of(table, feature)
            whole = outputs * table.width * table.compute
            if pooling is not None and self._alike:
                # Their gradients come one a feature, and are put together first.
                passes = 2 * self.pieces + 1 if table.learns else self.pieces
                seconds += self.op("join").seconds(0, outputs * strips * (2 if table.learns else 1) * self.pieces, passes * whole)
            elif strips > 1:
                seconds += self.op("join").seconds(0, outputs * strips, whole)
        return seconds

    def rejoined(self, table: Table) -> float:
        """What `join` leaves out where all is one piece, and is to be paid once it is not."""
        pooled = [outputs_of(table, feature) for feature, pooling in enumerate(table.poolings) if pooling is not None]
        if self.pieces or not self._alike:
            return 0.0
        passes = 2 if table.learns else 1
        return self.op("join").seconds(0, passes * sum(pooled), passes * sum(pooled) * table.width * table.compute)


def groups_of(table: Table, packing: Packing | str) -> set[Group]:
    """The groups of its slab that a table is in."""
    bags = table.read_by_bag(packing)
    return {"bags" if bag else pooling for bag, pooling in zip(bags, table.poolings, strict=True)}


def outputs_of(table: Table, feature: int) -> float:
    """Rows of a feature's output."""
    return table.feature_ids(feature) if table.poolings[feature] is None else table.traffic.bags[feature]
