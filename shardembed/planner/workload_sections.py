"""What may stand in a workload file and in a file of reuse histograms, and what not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, RootModel, field_validator, model_validator

from shardembed.errors import ConfigError
from shardembed.planner.dense import Dense
from shardembed.tables.optimizer_section import Count, Float, NotNegative, OptimizerSection, Section
from shardembed.tables.pooling import POOLINGS, kind_of

MAX_TABLES = 100_000
POOLING_NAMES = ", ".join("null (one vector an id)" if name is None else name for name in POOLINGS)


def _several(value: Any) -> Any:
    return value if isinstance(value, tuple) else (value,)


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _pooling(value: Any) -> Any:
    for given in value.values() if isinstance(value, Mapping) else (value,):
        try:
            kind_of(given)
        except ConfigError:
            raise ValueError(f"{given!r} is not one of {POOLING_NAMES}, or a mapping from features to these") from None
    return value


def _number(value: Any) -> Any:
    return math.inf if value == "inf" else value  # YAML's own word for it is .inf


# Beyond these a number is a slip, and what is computed from it no longer exact or finite.
MAX_IDS = 1e9  # of a sample, in one feature
Order = Literal["sorted", "hashed", "unknown"]  # popular rows come first; lie anywhere; or nobody knows
Size = Annotated[int, Field(ge=1, le=1 << 50)]
Length = Annotated[float, Field(gt=0, le=MAX_IDS, allow_inf_nan=False)]
IdsPerSample = Annotated[tuple[Length, ...], BeforeValidator(_several), Field(min_length=1)]


class ReuseChoice(Section):
    """A histogram in another file."""

    file: str
    set: str


class _Traffic(Section):
    """What may be said of all tables, of a group, or of a table; the innermost word counts."""

    optimizer: Annotated[OptimizerSection | None, BeforeValidator(_named)] = None
    dtype: Float | None = None
    pooling: Annotated[Any, PlainValidator(_pooling)] = "sum"
    id_skew: NotNegative | None = None
    id_order: Order | None = None
    reuse: ReuseChoice | None = None
    counts: str | None = None

    @model_validator(mode="after")
    def _one_skew(self) -> Any:
        given = [name for name in ("id_skew", "reuse", "counts") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say how often ids repeat; give one")
        if self.counts is not None and self.id_order is not None:
            raise ValueError("counts are by row number, so they say the order of rows themselves; leave out id_order")
        return self


class TableSection(_Traffic):
    """One table."""

    name: Annotated[str, Field(min_length=1)]
    num_embeddings: Size
    embedding_dim: Size
    ids_per_sample: IdsPerSample
    feature_names: tuple[str, ...] | None = None
    max_norm: NotNegative | None = None
    scale_grad_by_freq: bool = False
    frozen: bool = False

    @field_validator("feature_names")
    @classmethod
    def _a_feature_each(cls, value: tuple[str, ...] | None, info: Any) -> tuple[str, ...] | None:
        lengths = info.data.get("ids_per_sample", value)
        if value is not None and len(value) != len(lengths):
            raise ValueError(f"{len(value)} feature(s) are named, but ids_per_sample has {len(lengths)}; give one number a feature")
        return value


class GroupSection(_Traffic):
    """`count` tables alike: `name`_0, `name`_1 and so on, by default g0_0, g0_1 ... for the first group."""

    name: Annotated[str, Field(min_length=1)] | None = None
    count: Annotated[int, Field(ge=1, le=MAX_TABLES)]
    num_embeddings: Size
    embedding_dim: Size
    ids_per_sample: IdsPerSample


class DenseSection(Section):
    """The model around the tables, which every rank has whole: `ms` is what one rank takes for `samples` of its samples, forward,
    backward and update, measured without tables; `state` numbers of optimizer state a parameter, of which Adam has 2. For reports:
    no plan depends on it.
    """

    parameters: Annotated[int, Field(ge=0, le=1 << 50)] = 0
    state: Annotated[int, Field(ge=0, le=8)] = 2
    samples: Count | None = None
    ms: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None

    @field_validator("ms")
    @classmethod
    def _of_samples(cls, value: float | None, info: Any) -> float | None:
        if value is not None and info.data.get("samples", 1) is None:
            raise ValueError("say of how many samples: add samples, before or after it")
        return value

    def build(self) -> Dense:
        seconds = 0.0 if self.ms is None or self.samples is None else 1e-3 * self.ms / self.samples
        return Dense(seconds, self.parameters, self.state)


class WorkloadSection(_Traffic):
    """A whole file. `dense` and `samples_per_epoch` are for what reports predict; `dense_features` nobody reads."""

    name: Annotated[str, Field(min_length=1)] | None = None
    global_batch_size: Count
    samples_per_epoch: Annotated[int, Field(ge=1, le=1 << 60)] | None = None
    dense_features: Annotated[int, Field(ge=0)] | None = None
    dense: DenseSection | None = None
    wire_dtype: Float | Literal["int8"] | None = None
    tables: tuple[TableSection, ...] = ()
    table_groups: tuple[GroupSection, ...] = ()

    @model_validator(mode="after")
    def _some_tables(self) -> Any:
        number = len(self.tables) + sum(group.count for group in self.table_groups)
        if not 1 <= number <= MAX_TABLES:
            raise ValueError(f"tables and table_groups make {number} tables; a workload has 1 to {MAX_TABLES}")
        return self


class ReuseSection(Section):
    """One histogram."""

    tables: Size
    batch_size: Size
    ids: Size
    distinct_rows: Size
    upper_bounds: tuple[Annotated[float, Field(ge=1), BeforeValidator(_number)], ...]
    touched_rows: tuple[NotNegative, ...]
    accesses: tuple[NotNegative, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Any:
        bounds = self.upper_bounds
        if not len(bounds) == len(self.touched_rows) == len(self.accesses) or not bounds:
            raise ValueError("upper_bounds, touched_rows and accesses must be lists of the same length")
        if list(bounds) != sorted(set(bounds)) or bounds[-1] != math.inf:
            raise ValueError("upper_bounds must ascend and end with inf")
        if len(bounds) > 1 and bounds[-2] > 1 << 50:
            raise ValueError("upper_bounds but the last must not be above 2^50")
        for name in ("touched_rows", "accesses"):
            total = sum(getattr(self, name))
            if abs(total - 1.0) > 0.02:
                raise ValueError(f"{name} are shares of one whole, but add up to {total:.3g}")
        return self


class ReuseFile(RootModel[dict[str, ReuseSection]]):
    """Histograms by name."""
