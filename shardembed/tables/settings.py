"""How a collection travels and learns, and what its ranks must agree on before they begin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass

import torch

from shardembed.config.scalars import integer
from shardembed.errors import ConfigError
from shardembed.optim import TableOptimizer
from shardembed.tables.plan import Plan
from shardembed.tables.table_config import TableConfig

AGREED = "tables, plan, optimizers and settings"
SHARDS_SHOWN = 16
WIRE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8)


@dataclass(frozen=True)
class Settings:
    """How a collection travels and learns.

    Attributes:
        wire_dtype: of vectors and gradients between ranks; None sends each table in its own dtype. A value beyond the range of the
            wire dtype arrives as inf, as in `Tensor.to`; for gradients, `on_nonfinite` and GradScaler then see it. int8: each row
            as whole numbers and a scale (see `wire.narrow`).
        update: "step" keeps gradients until `Optimizer.step`; "backward" applies them at once and keeps nothing.
        reduction: "mean" divides gradients by the number of ranks, as DDP does; "sum" does not.
        seed: of the starting weights.
        kernel: "auto", or "reference" / "numba" / "triton" / "fbgemm" to pin what updates the tables.
        deterministic: sum gradients as fixed-point numbers, so that tables do not depend on the plan (see `journey.deterministic`).
    """

    wire_dtype: torch.dtype | None = None
    update: str = "step"
    reduction: str = "mean"
    seed: int = 0
    kernel: str = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        if self.update not in ("step", "backward"):
            raise ConfigError(f"update must be 'step' or 'backward', not {self.update!r}")
        if self.reduction not in ("mean", "sum"):
            raise ConfigError(f"gradient_reduction must be 'mean' or 'sum', not {self.reduction!r}")
        if self.wire_dtype not in WIRE_DTYPES:
            raise ConfigError(f"wire_dtype must be a floating-point dtype, torch.int8 or None, not {self.wire_dtype!r}")
        if self.deterministic and self.kernel == "fbgemm":
            raise ConfigError(
                "kernel='fbgemm' cannot be deterministic: the order of its sums depends on widths. Leave one of them out"
            )
        seed = integer(self.seed)
        if seed is None:
            raise ConfigError(f"seed must be an integer, not {self.seed!r}")
        object.__setattr__(self, "seed", seed)


def names_of(tables: Sequence[str]) -> str:
    """The tables of a collection, for messages."""
    more = f" and {len(tables) - 3} more" if len(tables) > 3 else ""
    return f"{', '.join(tables[:3])}{more}"


def agreed_lines(
    tables: Sequence[TableConfig], plan: Plan, optimizers: Sequence[TableOptimizer], settings: Settings, device: torch.device
) -> list[str]:
    """What must be the same on all ranks; short lines, since the first that differs is shown."""
    lines = [f"tables {[table.name for table in tables]}"]
    for table, optimizer, planned in zip(tables, optimizers, plan.tables, strict=True):
        # The first ones tell most plans apart, and the hash below tells all: a thousand ranks make a thousand shards a table.
        shown = planned.layout.shards[:SHARDS_SHOWN]
        shards = [f"rows {shard.rows} columns {shard.columns} ranks {_rank_text(shard.ranks)}" for shard in shown]
        lines += [
            f"table {table.name!r}: {table.num_embeddings} x {table.embedding_dim} {table.dtype}, {_described(table)}",
            f"table {table.name!r}: {optimizer.describe()}",
            f"table {table.name!r}: {planned.kind}, packing {planned.packing!r}, {shards}",
        ]
    return [*lines, f"plan {plan.hash}", f"{settings} on {device.type}"]


def _rank_text(ranks: tuple[int, ...]) -> str:
    return str(ranks) if len(ranks) <= SHARDS_SHOWN else f"({ranks[0]}, ..., {ranks[-1]})"


def _described(table: TableConfig) -> str:
    """Its features, and every other setting that is not at its default."""
    found = [f"features {table.feature_names}"]
    for field in fields(table)[4:]:
        value = getattr(table, field.name)
        if value == field.default or field.name == "dtype":
            continue
        if field.name == "init" and not is_dataclass(value):  # a function's repr has its address, which differs between ranks
            value = getattr(value, "__qualname__", type(value).__name__)
        found.append(f"{field.name}={value!r}")
    return ", ".join(found)
