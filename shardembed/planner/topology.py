"""The machines a plan is for: how many ranks, what each holds, and how fast it looks up, updates and talks. Read from a file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shardembed.config import located
from shardembed.config.explain import explain
from shardembed.config.located import Located
from shardembed.errors import ConfigError
from shardembed.planner import builtin
from shardembed.planner.communicators import communicator_bytes
from shardembed.planner.topology_sections import (
    GIB,
    OPTIONAL_OPS,
    REQUIRED_OPS,
    DeviceType,
    LinkSection,
    OpSection,
    TopologySection,
)
from shardembed.tables.layout import MAX_RANKS

GB = 1e9


@dataclass(frozen=True)
class Op:
    """Seconds of a kind of work.

    Attributes:
        call: a call.
        row: a row (or id) handled.
        byte: a byte read or written.
    """

    call: float
    row: float
    byte: float

    def seconds(self, calls: float, rows: float, nbytes: float) -> float:
        return calls * self.call + rows * self.row + nbytes * self.byte


@dataclass(frozen=True)
class Link:
    """One tier of the network, seen from a rank.

    Attributes:
        bandwidth: bytes a second in one direction.
        latency: seconds of a message.
        peer: seconds that each further peer of an all-to-all adds.
    """

    bandwidth: float
    latency: float
    peer: float = 0.0


@dataclass(frozen=True)
class Topology:
    """Equal ranks, and what connects them.

    Attributes:
        name: of the cluster.
        ranks: how many there are.
        ranks_per_node: to a node.
        memory: bytes a rank has.
        reserve: bytes of it that tables must leave alone.
        intra: the link between ranks of a node.
        inter: the link between nodes.
        ops: kinds of work by name (see `cost_ops`).
        source: where the figures are from, by name.
        device: type of device that tables lie on.
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
    device: DeviceType = "cpu"

    @property
    def communicators(self) -> int:
        """Bytes a rank that its communicators take; none on a CPU, where they are a few sockets."""
        return communicator_bytes(self.ranks, self.ranks_per_node) if self.device == "cuda" else 0

    @property
    def room(self) -> int:
        """Bytes a rank that tables may fill."""
        return self.memory - self.reserve - self.communicators

    def scaled(self, ranks: int) -> Topology:
        """The same machines, as many as `ranks` ranks need; the last node may be part of one.

        Raises:
            ConfigError: there is no such number of ranks.
        """
        if not 1 <= ranks <= MAX_RANKS:
            raise ConfigError(f"a topology has 1 to {MAX_RANKS:,} ranks, not {ranks:,}")
        return replace(self, ranks=ranks)


def load(name_or_path: str | Path, ranks: int | None = None) -> Topology:
    """Read a topology file, or one that comes along (`h200x8`, `h100x8`, `a100x8`, `cpu`).

    Args:
        ranks: as many of the same machines as that takes; by default as many as the file says.

    Raises:
        ConfigError: there is no such file, or something in it is wrong; all mistakes are listed, each with its place.
    """
    path = builtin.locate("topologies", name_or_path)
    document = located.load(path)
    try:
        section = TopologySection.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, TopologySection, document) from None
    given = {name: op for name in (*REQUIRED_OPS, *OPTIONAL_OPS) if (op := getattr(section.ops, f"op_{name}")) is not None}
    topology = Topology(
        section.name or path.stem,
        section.ranks,
        section.ranks_per_node,
        int(section.memory_gib * GIB),
        int(section.reserve_gib * GIB),
        _link(section.intra),
        _link(section.inter),
        {name: _op(name, op, section, document) for name, op in given.items()},
        dict(section.source),
        section.device,
    )
    return topology if ranks is None else topology.scaled(ranks)


def _link(section: LinkSection) -> Link:
    return Link(section.bandwidth_gb_per_s * section.efficiency * GB, section.latency_us * 1e-6, section.peer_us * 1e-6)


def _op(name: str, section: OpSection, topology: TopologySection, document: Located) -> Op:
    call = section.call_us * 1e-6
    if section.share is None:
        return Op(call, (section.row_ns or 0.0) * 1e-9, 1.0 / (section.gb_per_s * GB) if section.gb_per_s else 0.0)
    if topology.memory_bandwidth_gb_per_s is None:
        place = document.place(("ops", name, "share"))
        raise ConfigError(f"{place}: ops.{name}.share is of memory_bandwidth_gb_per_s, which the file does not give; add it")
    byte = 1.0 / (section.share * topology.memory_bandwidth_gb_per_s * GB)
    return Op(call, (section.row_bytes or 0.0) * byte, byte)


def to_yaml(topology: Topology) -> str:
    """A topology file, as `load` reads it back to four digits."""
    head: dict[str, Any] = {
        "name": topology.name,
        "ranks": topology.ranks,
        "ranks_per_node": topology.ranks_per_node,
        "device": topology.device,
        "memory_gib": round(topology.memory / GIB, 6),
        "reserve_gib": round(topology.reserve / GIB, 6),
    }
    lines = [yaml.safe_dump(head, sort_keys=False)]
    for name, link in (("intra", topology.intra), ("inter", topology.inter)):
        said = {"bandwidth_gb_per_s": link.bandwidth / GB, "latency_us": link.latency * 1e6, "peer_us": link.peer * 1e6}
        lines.append(f"{name}: {_flow(said)}\n")
    lines.append("ops:\n")
    for name, op in topology.ops.items():
        said = {"call_us": op.call * 1e6, "row_ns": op.row * 1e9}
        lines.append(f"  {name}: {_flow(said | ({'gb_per_s': 1 / op.byte / GB} if op.byte else {}))}\n")
    if topology.source:
        lines.append(yaml.safe_dump({"source": topology.source}, sort_keys=False, width=120, allow_unicode=True))
    return "".join(lines)


def _flow(numbers: dict[str, float]) -> str:
    short = {name: float(f"{number:.4g}") for name, number in numbers.items()}
    return "{" + ", ".join(f"{name}: {number!r}" for name, number in short.items()) + "}"
