"""The peers, each in a working configuration, as a step over the same flat ids; one that is not installed is left out, aloud."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn

Step = Callable[[torch.Tensor], None]
log = logging.getLogger("shardembed")


class Sizes(Protocol):
    """What a peer needs to know of a workload."""

    @property
    def tables(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def ids(self) -> int: ...
    @property
    def pooled(self) -> bool: ...


def plain_torch(size: Sizes) -> Step:
    """`nn.EmbeddingBag` (or `nn.Embedding`) with sparse gradients and `torch.optim.Adagrad`, one module a table."""
    kinds: dict[bool, Callable[[], nn.Module]] = {
        True: lambda: nn.EmbeddingBag(size.rows, size.dim, mode="sum", sparse=True),
        False: lambda: nn.Embedding(size.rows, size.dim, sparse=True),
    }
    modules = nn.ModuleList(kinds[size.pooled]() for _ in range(size.tables))
    optimizer = torch.optim.Adagrad(modules.parameters(), lr=0.01)

    def step(ids: torch.Tensor) -> None:
        shaped = ids.view(size.tables, size.batch, size.ids)
        vectors = torch.cat([module(shaped[i]).flatten(0, -2) for i, module in enumerate(modules)])
        vectors.backward(torch.ones_like(vectors))
        optimizer.step()
        optimizer.zero_grad()

    return step


def fbgemm(size: Sizes) -> dict[str, Step]:
    """FBGEMM's table-batched embedding bags alone, on one rank."""
    if not size.pooled:
        return {}
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
            ComputeDevice,
            SplitTableBatchedEmbeddingBagsCodegen,
        )
    except (ImportError, OSError) as error:
        log.warning("FBGEMM is left out: %s", error)
        return {}
    specs = [(size.rows, size.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * size.tables
    tables = SplitTableBatchedEmbeddingBagsCodegen(specs, optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD, learning_rate=0.01)
    offsets = torch.arange(0, size.tables * size.batch * size.ids + 1, size.ids)

    def step(ids: torch.Tensor) -> None:
        vectors: Any = tables(ids, offsets)
        vectors.backward(torch.ones_like(vectors))

    return {"FBGEMM TBE": step}


def torchrec(size: Sizes, kind: str) -> dict[str, Step]:
    """TorchRec's `DistributedModelParallel` with its fused rowwise Adagrad."""
    try:
        import torchrec
        from torchrec.distributed import DistributedModelParallel
        from torchrec.distributed.embedding import EmbeddingCollectionSharder
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
        from torchrec.distributed.types import ShardingEnv, ShardingPlan
        from torchrec.optim import RowWiseAdagrad
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
    except (ImportError, OSError) as error:
        log.warning("TorchRec is left out: %s", error)
        return {}
    ranks, group = dist.get_world_size(), dist.group.WORLD
    assert group is not None
    names = [f"f{i}" for i in range(size.tables)]
    config: Any = torchrec.EmbeddingBagConfig if size.pooled else torchrec.EmbeddingConfig
    shape = {"num_embeddings": size.rows, "embedding_dim": size.dim}
    configs: Any = [config(name=f"t{i}", feature_names=[name], **shape) for i, name in enumerate(names)]
    collection = (torchrec.EmbeddingBagCollection if size.pooled else torchrec.EmbeddingCollection)(
        device=torch.device("meta"), tables=configs
    )
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
    sharder: Any = EmbeddingBagCollectionSharder() if size.pooled else EmbeddingCollectionSharder()
    cuts = {"row_wise": lambda i: row_wise(), "table_wise": lambda i: table_wise(rank=i % ranks)}
    per_table = {f"t{i}": cuts[kind](i) for i in range(size.tables)}
    plan = construct_module_sharding_plan(collection, per_table, sharder, local_size=ranks, world_size=ranks, device_type="cpu")
    # The plan names the collection as a child, so it has to be one.
    wrapped = nn.ModuleDict({"tables": collection})
    model: Any = DistributedModelParallel(
        wrapped,
        env=ShardingEnv.from_process_group(group),
        device=torch.device("cpu"),
        plan=ShardingPlan({"tables": plan}),
        sharders=[sharder],
    )
    lengths = torch.full((size.tables * size.batch,), size.ids)

    def step(ids: torch.Tensor) -> None:
        out = model.module["tables"](torchrec.KeyedJaggedTensor(keys=names, values=ids, lengths=lengths))
        out = out.wait() if hasattr(out, "wait") else out
        vectors = out.values() if size.pooled else torch.cat([out[name].values() for name in names])
        vectors.backward(torch.ones_like(vectors))

    return {f"TorchRec {kind}": step}
