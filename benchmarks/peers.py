"""Plain torch and bare FBGEMM: peers on one rank, each as a step over the same ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import joined, learn
from benchmarks.crew import Contender
from benchmarks.tasks import Batch, Flat, Task
from shardembed.tables.pooling import Pooling

LR = 0.01
SPARSE: set[Pooling] = {"sum", "mean", None}  # what torch's modules with sparse gradients pool by


def plain_torch(task: Task, batches: Sequence[Batch]) -> Contender | str:
    """`nn.EmbeddingBag` or `nn.Embedding` with sparse gradients and `torch.optim.Adagrad`, a module a table."""
    modules: dict[str, nn.Module] = {}
    for table in task.tables:
        pooling = {table.pooling_of(name) for name in table.feature_names or ()}
        if len(pooling) > 1 or pooling - SPARSE:
            return f"table {table.name!r} is pooled in ways that one module with sparse gradients has not"
        mode, shape = pooling.pop(), (table.num_embeddings, table.embedding_dim)
        weight = torch.full(shape, 0.01)
        kinds: tuple[Callable[[], nn.Module], ...] = (
            lambda weight=weight: nn.Embedding.from_pretrained(weight, freeze=False, sparse=True),
            lambda weight=weight, mode=mode: nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode=str(mode), sparse=True),
        )
        modules[table.name] = kinds[mode is not None]()
    optimizer = torch.optim.Adagrad([p for module in modules.values() for p in module.parameters()], lr=LR)
    called = [(modules[table.name], name) for table in task.tables for name in table.feature_names or ()]

    def step(batch: Batch) -> None:
        outputs = []
        for module, name in called:
            ids, offsets = batch[name]
            outputs.append(module(ids) if isinstance(module, nn.Embedding) else module(ids, offsets[:-1]))
        learn(joined(outputs, task.pooled))
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, batches)


def fbgemm(task: Task, batches: Sequence[Batch]) -> Contender | str:
    """FBGEMM's table-batched embedding bags alone, which give one tensor and update on the way back. Sequences are bags of one id
    each, which is its faster way.
    """
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

    modes: dict[Pooling, Any] = {"sum": PoolingMode.SUM, "mean": PoolingMode.MEAN, None: PoolingMode.SUM}
    if len(task.poolings) > 1 or task.poolings - set(modes):
        return "its bags are all pooled in one way, sum or mean"
    specs = [(table.num_embeddings, table.embedding_dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for table in task.tables]
    tables = SplitTableBatchedEmbeddingBagsCodegen(
        specs,
        feature_table_map=[i for i, table in enumerate(task.tables) for _ in table.feature_names or ()],
        pooling_mode=modes[next(iter(task.poolings))],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
    )
    for weight in tables.split_embedding_weights():
        weight.fill_(0.01)

    def step(flat: Flat) -> None:
        vectors: Any = tables(flat.ids, flat.offsets)
        learn(vectors)

    return Contender(step, [Flat.of(batch, task.features, one_an_id=not task.pooled) for batch in batches])
