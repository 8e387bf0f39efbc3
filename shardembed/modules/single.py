"""One sharded table as `nn.Embedding` or `nn.EmbeddingBag`: torch's arguments in torch's order, then ours."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

import torch
import torch.distributed as dist
from typing_extensions import Unpack

from shardembed.errors import UnsupportedError
from shardembed.ids import IdBatch, jagged_offsets
from shardembed.journey import Settings
from shardembed.modules.base import ShardedModule, build_journey
from shardembed.optim import TableOptimizer
from shardembed.plan import PlanLike
from shardembed.tables import Init, Normal, Pooling, TableConfig, features_of

NORM_TYPE = 2.0


class Sharding(TypedDict, total=False):
    """The keyword arguments that the drop-ins take beside torch's; as in `EmbeddingCollection`."""

    optimizer: TableOptimizer | None
    plan: PlanLike
    init: Init | None
    wire_dtype: torch.dtype | None
    update: Literal["step", "backward"]
    gradient_reduction: Literal["mean", "sum"]
    process_group: dist.ProcessGroup | None
    seed: int
    kernel: Literal["auto", "reference", "fbgemm"]


class _Single(ShardedModule):
    """One table with one feature of the same name."""

    def __init__(self, table: TableConfig, device: torch.device | str | None, sharding: Sharding) -> None:
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
        self.feature = features_of(journey.tables)[0]
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim

    def _weight_keys(self) -> dict[str, str]:
        return {"weight": self.tables[0].name}


class Embedding(_Single):
    """`nn.Embedding`, cut over the ranks: ids of any shape in, `[*ids.shape, embedding_dim]` out.

    Args:
        num_embeddings, embedding_dim, device, dtype: as in `nn.Embedding`; rows start from N(0, 1) too. padding_idx, max_norm,
            norm_type, scale_grad_by_freq, sparse and _weight are accepted at their defaults only.
        feature: the table's name, in plans, errors and keys.
        sharding: `optimizer`, `plan`, `wire_dtype`, `update`, `gradient_reduction`, `process_group`, `seed`, `kernel` as in
            `EmbeddingCollection`, and `init` as in `TableConfig`.

    Raises:
        UnsupportedError: an argument of nn.Embedding that is not served yet.
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
        refuse("Embedding", padding_idx=padding_idx, max_norm=max_norm, _weight=_weight)
        refuse("Embedding", scale_grad_by_freq=scale_grad_by_freq or None, sparse=sparse or None, _freeze=_freeze or None)
        table = _table(feature, num_embeddings, embedding_dim, None, dtype, sharding.get("init"))
        super().__init__(table, device, sharding)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[*input.shape, embedding_dim]`. Collective; the batch of a rank may be empty."""
        device, feature = self.journey.device, self.feature
        output = self.journey.forward(lambda: IdBatch.of({feature.name: input}, [feature], device), [feature])[0]
        return torch.nested.nested_tensor_from_jagged(output, jagged_offsets(input)) if input.is_nested else output


class EmbeddingBag(_Single):
    """`nn.EmbeddingBag`, cut over the ranks: bags of ids in, `[B, embedding_dim]` out.

    Args:
        num_embeddings, embedding_dim, mode ("mean" by default), include_last_offset, device, dtype: as in `nn.EmbeddingBag`;
            rows start from N(0, 1) too. max_norm, norm_type, scale_grad_by_freq, sparse, _weight and padding_idx are accepted
            at their defaults only.
        feature: the table's name, in plans, errors and keys.
        sharding: `optimizer`, `plan`, `wire_dtype`, `update`, `gradient_reduction`, `process_group`, `seed`, `kernel` as in
            `EmbeddingCollection`, and `init` as in `TableConfig`.

    Raises:
        UnsupportedError: an argument of nn.EmbeddingBag that is not served yet.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = NORM_TYPE,
        scale_grad_by_freq: bool = False,
        mode: Literal["sum", "mean", "max"] = "mean",
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        feature: str = "embedding",
        **sharding: Unpack[Sharding],
    ) -> None:
        refuse("EmbeddingBag", padding_idx=padding_idx, max_norm=max_norm, _weight=_weight)
        refuse("EmbeddingBag", scale_grad_by_freq=scale_grad_by_freq or None, sparse=sparse or None)
        table = _table(feature, num_embeddings, embedding_dim, mode, dtype, sharding.get("init"))
        super().__init__(table, device, sharding)
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(
        self, input: torch.Tensor, offsets: torch.Tensor | None = None, per_sample_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[B, embedding_dim]`, from `[B, L]` ids, or `[n]` ids with offsets. Collective; the batch of a rank may be empty."""
        feature, device, last = self.feature, self.journey.device, self.include_last_offset
        bags = (input, offsets, per_sample_weights, last)
        return self.journey.forward(lambda: IdBatch.of_bags(*bags, feature, device), [feature])[0]


def refuse(module: str, **arguments: Any) -> None:
    """Refuse arguments that are given but not served.

    Raises:
        UnsupportedError: naming the arguments.
    """
    given = sorted(name for name, value in arguments.items() if value is not None)
    if given:
        raise UnsupportedError(
            f"{module}: {', '.join(given)} is not served on a sharded table yet; keep a plain nn.{module} for this table"
        )


def _table(name: str, rows: int, columns: int, pooling: Pooling, dtype: torch.dtype | None, init: Init | None) -> TableConfig:
    return TableConfig(
        name,
        rows,
        columns,
        pooling=pooling,
        dtype=dtype or torch.get_default_dtype(),
        init=init if init is not None else Normal(),
    )
