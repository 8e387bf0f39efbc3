"""One sharded table as `nn.Embedding` or `nn.EmbeddingBag`: torch's arguments in torch's order, then ours."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from typing_extensions import Self, Unpack

from shardembed.errors import ConfigError, StepError
from shardembed.ids import FeatureIds, IdBatch, jagged_offsets
from shardembed.journey import Journey, Settings
from shardembed.modules.base import ShardedModule, build_journey, eager
from shardembed.optim import TableOptimizer
from shardembed.plan import PlanLike
from shardembed.tables import Constant, Feature, Init, Normal, Rounding, TableConfig, features_of

NORM_TYPE = 2.0
Mode = Literal["sum", "mean", "max"]


class Sharding(TypedDict, total=False):
    """The keyword arguments that the drop-ins take beside torch's.

    `optimizer`, `plan`, `wire_dtype`, `update`, `gradient_reduction`, `process_group`, `seed` and `kernel` are as in
    `EmbeddingCollection`; `init` and `rounding` as in `TableConfig`, but rounding is "nearest" by default, as torch rounds.
    """

    optimizer: TableOptimizer | None
    plan: PlanLike
    init: Init | None
    rounding: Rounding
    wire_dtype: torch.dtype | None
    update: Literal["step", "backward"]
    gradient_reduction: Literal["mean", "sum"]
    process_group: dist.ProcessGroup | None
    seed: int
    kernel: Literal["auto", "reference", "fbgemm"]


@dataclass(frozen=True)
class Ready:
    """An output that waits for the call it was made for."""

    arguments: tuple[Any, ...]
    output: torch.Tensor

    def is_for(self, arguments: tuple[Any, ...]) -> bool:
        """The call's arguments are the announced ones; the same objects, or equal ones (a host sync on a GPU)."""
        pairs = zip_longest(self.arguments, arguments)
        return all(ours is theirs or _equal(ours, theirs) for ours, theirs in pairs)


def _equal(ours: Any, theirs: Any) -> bool:
    both = isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor) and not ours.is_nested and not theirs.is_nested
    return both and ours.device == theirs.device and torch.equal(ours, theirs)


class _Single(ShardedModule):
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
        )
        plan, group = sharding.get("plan", "auto"), sharding.get("process_group")
        journey = build_journey([table], sharding.get("optimizer"), plan, device, group, settings)
        super().__init__(journey, journey.tables)
        self._settle(table, features_of(journey.tables)[0])
        if weight is not None:
            self.load_rows(table.name, weight)

    def _settle(self, table: TableConfig, feature: Feature) -> None:
        """torch's attributes, and how this module looks up its table."""
        self.feature = feature
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.max_norm, self.norm_type = table.max_norm, table.norm_type
        self.scale_grad_by_freq, self.sparse = table.scale_grad_by_freq, table.sparse
        self._ready: list[Ready] = []
        self._taken_already: list[Ready] = []

    @classmethod
    def on(cls, journey: Journey, feature: Feature) -> Self:
        """A module on a table that a journey has already; several may share one."""
        module, table = cls.__new__(cls), journey.tables[feature.table]
        ShardedModule.__init__(module, journey, [table])
        module._settle(table, feature)
        return module

    def hand_out(self, arguments: tuple[Any, ...], output: torch.Tensor) -> None:
        """Let the next call, which must come with these `arguments`, return what a shared journey has looked up already."""
        self._ready.append(Ready(arguments, output))

    def forget(self) -> None:
        """Drop what was handed out."""
        self._ready.clear()
        self._taken_already.clear()

    def _taken(self, arguments: tuple[Any, ...]) -> torch.Tensor | None:
        if torch._C._current_graph_task_id() >= 0:
            # A checkpoint runs its part of the forward again in the backward, and must meet the same tensors.
            return next((ready.output for ready in self._taken_already if ready.is_for(arguments)), None)
        if not self._ready:
            return None
        ready = self._ready.pop(0)
        if torch.is_grad_enabled():  # else a reentrant checkpoint, which wants a graph of its own the second time
            self._taken_already.append(ready)
        if not ready.is_for(arguments):
            raise StepError(
                f"{self.feature.name} was called with other ids than inputs= announced to shard() for it; let inputs= return, for "
                "each module, exactly what it is called with (a list where it is called several times, in that order)"
            )
        return ready.output

    def read(self, *arguments: Any) -> FeatureIds:
        """This module's own arguments as ids of its feature."""
        raise NotImplementedError  # the two modules do

    def _weight_keys(self) -> dict[str, str]:
        return {"weight": self.tables[0].name}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not while it is being built: torch registers no parameter (optimizer=None) under a name that is taken.
            if name == "weight" and "feature" in self.__dict__:
                return self._handle(self.tables[0].name)
            raise


class Embedding(_Single):
    """`nn.Embedding`, cut over the ranks: ids of any shape in, `[*ids.shape, embedding_dim]` out.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, device, dtype: as in `nn.Embedding`,
            with the batch of all ranks as the batch. Rows start from N(0, 1) too, drawn so that they do not depend on the plan.
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
        num_embeddings: int,
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
            **_start(_weight, dtype, sharding),
        )
        super().__init__(table, _weight, device, sharding)

    @eager
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[*input.shape, embedding_dim]`. Collective; the batch of a rank may be empty."""
        output = self._taken((input,))
        if output is None:
            output = self.journey.forward(lambda: IdBatch.join((self.read(input),)), [self.feature])[0]
        return torch.nested.nested_tensor_from_jagged(output, jagged_offsets(input)) if input.is_nested else output

    def read(self, *arguments: Any) -> FeatureIds:
        (input,) = arguments
        return IdBatch.of({self.feature.name: input}, [self.feature], self.journey.device).parts[0]

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
            too, drawn so that they do not depend on the plan.
        sparse, _weight, feature, sharding: as in `Embedding`.

    Raises:
        ConfigError, PlanError: settings that do not fit. DisagreementError: on all ranks, when they differ between ranks.
    """

    def __init__(
        self,
        num_embeddings: int,
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
            **_start(_weight, dtype, sharding),
        )
        super().__init__(table, _weight, device, sharding)
        self.include_last_offset = include_last_offset

    include_last_offset: bool

    @property
    def mode(self) -> Mode:
        """As in `nn.EmbeddingBag`."""
        assert self.feature.pooling is not None
        return self.feature.pooling

    @eager
    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, embedding_dim]`, from `[B, L]` ids, or `[n]` ids with offsets. Collective; the batch of a rank may be empty."""
        output = self._taken((input, offsets, per_sample_weights))
        if output is not None:
            return output
        arguments = (input, offsets, per_sample_weights)
        return self.journey.forward(lambda: IdBatch.join((self.read(*arguments),)), [self.feature])[0]

    def read(self, *arguments: Any) -> FeatureIds:
        ids, offsets, weights = (*arguments, None, None)[:3]
        return IdBatch.of_bags(ids, offsets, weights, self.include_last_offset, self.feature, self.journey.device).parts[0]

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


def _start(weight: torch.Tensor | None, dtype: torch.dtype | None, sharding: Sharding) -> dict[str, Any]:
    """dtype, start and rounding of the rows."""
    given = sharding.get("init")
    init = Constant(0.0) if weight is not None else Normal() if given is None else given  # given rows need not be drawn first
    own = torch.get_default_dtype() if weight is None else weight.dtype
    return {"dtype": dtype or own, "init": init, "rounding": sharding.get("rounding", "nearest")}


def _matrix(embeddings: torch.Tensor) -> tuple[int, int]:
    if embeddings.dim() != 2:
        raise ConfigError(f"embeddings must be [num_embeddings, embedding_dim], not {list(embeddings.shape)}")
    return embeddings.shape[0], embeddings.shape[1]
