"""One sharded table as `nn.Embedding` or `nn.EmbeddingBag`: torch's arguments in torch's order, then ours."""

from __future__ import annotations

from typing import Any, Literal, TypedDict, cast, get_args

import torch
import torch.distributed as dist
from typing_extensions import Self, Unpack

from shardembed.errors import ConfigError
from shardembed.inputs.features import FeatureIds
from shardembed.inputs.ids import IdBatch, read_features
from shardembed.journey.journey import Journey
from shardembed.modules.answers import nested_like
from shardembed.modules.base import eager
from shardembed.modules.build import build_journey
from shardembed.modules.lookup import Lookup
from shardembed.optim import TableOptimizer
from shardembed.tables.dynamic import Dynamic
from shardembed.tables.plan import PlanLike
from shardembed.tables.settings import Settings
from shardembed.tables.table_config import Feature, Init, Loaded, Normal, Rounding, TableConfig, features_of

NORM_TYPE = 2.0
Mode = Literal["sum", "mean", "max"]  # torch's; there may be more poolings


class Sharding(TypedDict, total=False):
    """The keyword arguments that the drop-ins take beside torch's.

    `optimizer`, `plan`, `wire_dtype`, `update`, `gradient_reduction`, `process_group`, `seed`, `kernel` and `deterministic` are as
    in `EmbeddingCollection`; `init`, `rounding` and `dynamic` as in `TableConfig`, but rounding is "nearest" by default, as torch
    rounds.
    """

    optimizer: TableOptimizer | None
    plan: PlanLike
    init: Init | None
    rounding: Rounding
    dynamic: Dynamic | None
    wire_dtype: torch.dtype | None
    update: Literal["step", "backward"]
    gradient_reduction: Literal["mean", "sum"]
    process_group: dist.ProcessGroup | None
    seed: int
    kernel: Literal["auto", "reference", "numba", "triton", "fbgemm"]
    deterministic: bool


class _Single(Lookup):
    """One table with one feature of the same name."""

    def __init__(
        self, table: TableConfig, weight: torch.Tensor | None, device: torch.device | str | None, sharding: Sharding
    ) -> None:
        unknown = sorted(set(sharding) - set(Sharding.__annotations__))
        if unknown:
            raise TypeError(f"{type(self).__name__} got unexpected keyword argument(s) {unknown}")
        settings = Settings(
            sharding.get("wire_dtype"),
            sharding.get("update", "step"),
            sharding.get("gradient_reduction", "mean"),
            sharding.get("seed", 0),
            sharding.get("kernel", "auto"),
            sharding.get("deterministic", False),
        )
        plan, group = sharding.get("plan", "auto"), sharding.get("process_group")
        journey = build_journey([table], sharding.get("optimizer"), plan, device, group, settings)
        self._settle(journey, features_of(journey.tables)[0])
        if weight is not None:
            self.load_rows(table.name, weight)

    def _settle(self, journey: Journey, feature: Feature) -> None:
        """Look up `feature`, and have torch's attributes."""
        table = journey.tables[feature.table]
        Lookup.__init__(self, journey, feature.name, [feature], {"weight": table.name})
        self.feature = feature
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.max_norm, self.norm_type = table.max_norm, table.norm_type
        self.scale_grad_by_freq, self.sparse = table.scale_grad_by_freq, table.sparse

    @classmethod
    def on(cls, journey: Journey, feature: Feature) -> Self:
        """A module on a table that a journey has already; several may share one."""
        module = cls.__new__(cls)
        module._settle(journey, feature)
        return module

    def extra_repr(self) -> str:
        table = self.tables[0]
        said = [str(None if table.grows else table.num_embeddings), str(table.embedding_dim)]
        usual = {"padding_idx": None, "max_norm": None, "norm_type": NORM_TYPE, "scale_grad_by_freq": False, "sparse": False}
        said += [f"{name}={getattr(self, name)}" for name, value in usual.items() if getattr(self, name) != value]
        if self.feature.pooling is not None:
            said.append(f"mode={self.feature.pooling!r}")
        if table.dynamic is not None:
            said.append(f"dynamic={table.dynamic}")
        planned = next(planned for planned in self.plan.tables if planned.name == table.name)
        return f"{', '.join(said)}, {planned.kind} over {len(planned.layout.ranks)} rank(s)"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not while it is being built: torch registers no parameter (optimizer=None) under a name that is taken.
            if name == "weight" and "feature" in self.__dict__:
                return self._live_handle(self.tables[0].name)
            raise


class Embedding(_Single):
    """`nn.Embedding`, cut over the ranks: ids of any shape in, `[*ids.shape, embedding_dim]` out.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, device, dtype: as in `nn.Embedding`,
            with the batch of all ranks as the batch. Rows start from N(0, 1) too, drawn so that they do not depend on the plan.
            num_embeddings=None: a dynamic table without a limit.
        sparse: with `optimizer=None`, gradients are sparse; else without effect, since only touched rows are updated anyway.
        _weight: starting weights `[num_embeddings, embedding_dim]`, the same on every rank; each reads its own part.
        _freeze: no updates.
        feature: the table's name, in plans, errors and keys.
        sharding: see `Sharding`.

    Raises:
        ConfigError, PlanError: settings that do not fit. DisagreementError: on all ranks, when they differ between ranks.
    """

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = NORM_TYPE,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        feature: str = "embedding",
        **sharding: Unpack[Sharding],
    ) -> None:
        table = TableConfig(
            feature,
            num_embeddings,
            embedding_dim,
            pooling=None,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            frozen=_freeze,
            **_start(feature, _weight, dtype, sharding),
        )
        super().__init__(table, _weight, device, sharding)

    @eager
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[*input.shape, embedding_dim]`. Collective; the batch of a rank may be empty."""
        output = self.look_up(input).each[0]
        return nested_like(input, output) if input.is_nested else output

    def read(self, *arguments: Any) -> tuple[FeatureIds, ...]:
        (input,) = arguments
        return read_features({self.feature.key: input}, self.features, self.journey.device)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: torch.Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = NORM_TYPE,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        feature: str = "embedding",
        **sharding: Unpack[Sharding],
    ) -> Self:
        """As `nn.Embedding.from_pretrained`; `embeddings` `[num_embeddings, embedding_dim]` may be a memory-mapped tensor."""
        rows, columns = _matrix(embeddings)
        return cls(
            rows,
            columns,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight=embeddings,
            _freeze=freeze,
            feature=feature,
            **sharding,
        )


class EmbeddingBag(_Single):
    """`nn.EmbeddingBag`, cut over the ranks: bags of ids in, `[B, embedding_dim]` out.

    Args:
        num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode ("mean" by default), include_last_offset,
            padding_idx, device, dtype: as in `nn.EmbeddingBag`, with the batch of all ranks as the batch. Rows start from N(0, 1)
            too, drawn so that they do not depend on the plan. num_embeddings=None: a dynamic table without a limit.
        sparse, _weight, feature, sharding: as in `Embedding`.

    Raises:
        ConfigError, PlanError: settings that do not fit. DisagreementError: on all ranks, when they differ between ranks.
    """

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = NORM_TYPE,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        _freeze: bool = False,
        feature: str = "embedding",
        **sharding: Unpack[Sharding],
    ) -> None:
        if mode not in get_args(Mode):
            raise ConfigError(f"table {feature!r}: mode must be 'sum', 'mean' or 'max', not {mode!r}")
        table = TableConfig(
            feature,
            num_embeddings,
            embedding_dim,
            pooling=mode,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
            frozen=_freeze,
            **_start(feature, _weight, dtype, sharding),
        )
        super().__init__(table, _weight, device, sharding)
        self.include_last_offset = include_last_offset

    include_last_offset: bool

    @property
    def mode(self) -> Mode:
        """As in `nn.EmbeddingBag`."""
        return cast(Mode, self.feature.pooling)

    @eager
    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, embedding_dim]`, from `[B, L]` ids, or `[n]` ids with offsets. Collective; the batch of a rank may be empty."""
        return self.look_up(input, offsets, per_sample_weights).each[0]

    def read(self, *arguments: Any) -> tuple[FeatureIds, ...]:
        ids, offsets, weights = (*arguments, None, None)[:3]
        device, last = self.journey.device, self.include_last_offset
        return tuple(IdBatch.of_bags(ids, offsets, weights, last, self.feature, device, self._last_takes_rest).parts)

    @property
    def _last_takes_rest(self) -> bool:
        """Ids behind the last offset belong to the last bag, as in torch (2.13) but for its fast sums on the CPU, which contradict
        themselves there.
        """
        table, on_gpu = self.tables[0], self.journey.device.type != "cpu"
        return on_gpu or self.mode == "max" or table.padding_idx is not None or table.dtype == torch.float64

    @classmethod
    def from_pretrained(
        cls,
        embeddings: torch.Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = NORM_TYPE,
        scale_grad_by_freq: bool = False,
        mode: Mode = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        feature: str = "embedding",
        **sharding: Unpack[Sharding],
    ) -> Self:
        """As `nn.EmbeddingBag.from_pretrained`; `embeddings` may be a memory-mapped tensor."""
        rows, columns = _matrix(embeddings)
        return cls(
            rows,
            columns,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            embeddings,
            include_last_offset,
            padding_idx,
            _freeze=freeze,
            feature=feature,
            **sharding,
        )


def _start(name: str, weight: torch.Tensor | None, dtype: torch.dtype | None, sharding: Sharding) -> dict[str, Any]:
    """dtype, start, rounding, and coming and going of the rows."""
    dynamic = sharding.get("dynamic")
    if dynamic is not None and weight is not None:
        raise ConfigError(f"table {name!r} is dynamic: its rows have no numbers, so no matrix says how they start; give init=")
    given = sharding.get("init")
    start = Normal() if given is None else given
    init = start if weight is None else Loaded(lambda: start)
    own = torch.get_default_dtype() if weight is None else weight.dtype
    return {"dtype": dtype or own, "init": init, "rounding": sharding.get("rounding", "nearest"), "dynamic": dynamic}


def _matrix(embeddings: torch.Tensor) -> tuple[int, int]:
    if embeddings.dim() != 2:
        raise ConfigError(f"embeddings must be [num_embeddings, embedding_dim], not {list(embeddings.shape)}")
    return embeddings.shape[0], embeddings.shape[1]
