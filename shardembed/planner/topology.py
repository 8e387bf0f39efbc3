"""The machines a plan is for: how many ranks, what each holds, and how fast it looks up, updates and talks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Op:
    """Seconds of a kind of work: `call` a call, `row` a row (or id) handled, `byte` a byte read or written."""

    call: float
    row: float
    byte: float

    def seconds(self, calls: float, rows: float, nbytes: float) -> float:
        return calls * self.call + rows * self.row + nbytes * self.byte


@dataclass(frozen=True)
class Link:
    """One tier of the network, seen from a rank. bandwidth: bytes a second in one direction. latency: seconds of a message.

    peer: seconds that each further peer of an all-to-all adds.
    """

    bandwidth: float
    latency: float
    peer: float = 0.0


@dataclass(frozen=True)
class Topology:
    """`ranks` equal ranks, `ranks_per_node` to a node. memory: bytes a rank has; reserve: bytes of it that tables must leave alone.

    intra: the link between ranks of a node; inter: between nodes. ops: kinds of work by name (see `cost.py`). source: where the
    figures are from, by name.
    """

    name: str
    ranks: int
    ranks_per_node: int
    memory: int
    reserve: int
    intra: Link
    inter: Link
    ops: dict[str, Op]
    source: dict[str, str] = field(default_factory=dict)

    def scaled(self, ranks: int) -> Topology:
        """The same machines, as many as `ranks` ranks need; the last node may be part of one."""
        return replace(self, ranks=ranks)
