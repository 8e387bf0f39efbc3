"""What may stand in a topology file. Keys say their units; `cost_ops` says what each kind of work is."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, create_model, model_validator

from shardembed import optim
from shardembed.optim import TableOptimizer
from shardembed.planner.communicators import communicator_bytes
from shardembed.tables.layout import MAX_RANKS
from shardembed.tables.optimizer_section import Section

REQUIRED_OPS = (
    *("step", "route_ids", "route_unique", "route_place", "route_bag", "route_slab", "copy", "lookup", "lookup_sum", "pool"),
    *("pool_adjoint", "gather", "gather_adjoint", "output", "merge", "update", "dense", "all_reduce"),
)


def optimizer_name(kind: type[TableOptimizer]) -> str:
    """As ops name an optimizer: RowwiseAdagrad is rowwise_adagrad, AdamW adamw, FTRL ftrl."""
    return re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", "_", kind.__name__).lower()


OPTIONAL_OPS = (
    *("counts", "message", "block", "order", "pool_max", "join", "backward", "apply", "round", "twins", "fused_merge", "fused"),
    *(f"{kind}_{name}" for kind in ("update", "fused") for name in map(optimizer_name, optim.KINDS)),
)

GIB = 2**30
# Beyond these a number is a slip, and what is computed from it infinite.
LEAST, MOST = 1e-9, 1e12
Share = Annotated[float, Field(gt=0, le=1), Field(ge=LEAST)]
Amount = Annotated[float, Field(gt=0, allow_inf_nan=False), Field(ge=LEAST, le=MOST)]
Cost = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False)]
DeviceType = Literal["cpu", "cuda"]


class LinkSection(Section):
    """A tier of the network, seen from one rank. efficiency: the share of `bandwidth_gb_per_s` that a large message reaches."""

    bandwidth_gb_per_s: Amount
    efficiency: Share = 1.0
    latency_us: Cost
    peer_us: Cost = 0.0


class OpSection(Section):
    """A kind of work. Rows and bytes are given as measured (`row_ns`, `gb_per_s`), or by what they move: each row `row_bytes`
    beside its own bytes, at a `share` of the memory's bandwidth.
    """

    call_us: Cost = 0.0
    row_ns: Cost | None = None
    gb_per_s: Amount | None = None
    row_bytes: Cost | None = None
    share: Share | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Any:
        if self.share is None and self.row_bytes is not None:
            raise ValueError("row_bytes needs a share of the memory's bandwidth at which they move")
        if self.share is not None and (self.row_ns is not None or self.gb_per_s is not None):
            raise ValueError("give either row_ns and gb_per_s, as measured, or row_bytes and share")
        return self


def _field(name: str, default: Any) -> Any:
    return Field(default, alias=name)  # a field of a pydantic model may not be called `copy`


_REQUIRED: dict[str, Any] = {f"op_{name}": (OpSection, _field(name, ...)) for name in REQUIRED_OPS}
_OPTIONAL: dict[str, Any] = {f"op_{name}": (OpSection | None, _field(name, None)) for name in OPTIONAL_OPS}
OpsSection = create_model("OpsSection", __base__=Section, **_REQUIRED, **_OPTIONAL)


class TopologySection(Section):
    """A whole file. Memory and its bandwidth are those of a rank, and `source` says where the figures are from."""

    name: Annotated[str, Field(min_length=1)] | None = None
    ranks: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    ranks_per_node: Annotated[int, Field(ge=1, le=MAX_RANKS)]
    device: DeviceType = "cpu"
    memory_gib: Amount
    reserve_gib: Cost = 0.0
    memory_bandwidth_gb_per_s: Amount | None = None
    intra: LinkSection
    inter: LinkSection
    ops: OpsSection  # pyright: ignore[reportInvalidTypeForm] -- its fields are named above
    source: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _room(self) -> Any:
        taken = communicator_bytes(self.ranks, self.ranks_per_node) / GIB if self.device == "cuda" else 0.0
        if self.reserve_gib + taken >= self.memory_gib:
            beside = f", beside {taken:.1f} GiB of communicators," if taken else ""
            raise ValueError(
                f"reserve_gib {self.reserve_gib:g}{beside} leaves nothing of memory_gib {self.memory_gib:g} for tables"
            )
        return self
