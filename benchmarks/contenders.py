"""Ours: a training step as a user of the library writes it, under each kind of plan and with each setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import shardembed as se
from benchmarks.crew import Contender
from benchmarks.tasks import Batch, Task
from shardembed.tables.placement import Packing, Placement

OURS = "shardembed"  # the contender that the others are compared with
AUTO = "auto"
KINDS = ("row_wise", "table_wise", "column_wise", "mixed", AUTO)


@dataclass(frozen=True)
class Setting:
    """What a user may say beside the kind of plan; what he gets by default is what is measured as `OURS`.

    Attributes:
        packing: of all tables.
        strided: as of `row_wise`.
        wire_dtype: of vectors on their way.
        ahead: the ids of a batch are sent while the one before computes.
        whole: the vectors' one tensor is asked for, where they pool, in place of a concatenation as of any tensors.
        read: batches are `IdBatch`es, made before the step, as by a worker of a DataLoader.
        keep_memory: as of `se.init`.
    """

    packing: Packing | None = None
    strided: bool | None = None
    wire_dtype: torch.dtype | None = None
    ahead: bool = False
    whole: bool = False
    read: bool = False
    keep_memory: bool = True


def placement(kind: str, number: int, ranks: int, setting: Setting = Setting()) -> Placement:
    """Where table `number` lies. mixed: a third of the tables each way."""
    packing = setting.packing
    if kind == "mixed":
        return placement(KINDS[number % 3], number // 3, ranks, setting)
    if kind == "row_wise":
        return se.row_wise(strided=setting.strided, packing=packing)
    if kind == "table_wise":
        return se.table_wise(number % ranks, packing=packing)
    return se.column_wise(packing=packing)


def ours(task: Task, kind: str, setting: Setting, batches: Sequence[Batch]) -> Contender:
    """On dicts of ids and offsets."""
    se.init(keep_memory=setting.keep_memory)
    optimizers = {load.table.name: load.optimizer for load in task.workload.tables}
    cut = {table.name: placement(kind, i, se.world_size(), setting) for i, table in enumerate(task.tables) if kind != AUTO}
    emb = se.EmbeddingCollection(task.tables, optimizer=optimizers, plan=cut or AUTO, wire_dtype=setting.wire_dtype)
    optimizer = se.Optimizer(emb)

    def step(batch: Any) -> None:
        out = emb(batch)
        learn(out.concatenated() if setting.whole else joined(list(out.values()), task.pooled))
        optimizer.step()
        optimizer.zero_grad()

    ahead: Callable[[Sequence[Any]], Any] | None = (lambda batches: se.prefetched(batches, emb)) if setting.ahead else None
    given: Sequence[Any] = [se.IdBatch.of(batch, emb.features) for batch in batches] if setting.read else batches
    return Contender(step, given, ahead, emb)


def joined(outputs: Sequence[torch.Tensor], pooled: bool) -> torch.Tensor:
    """One tensor of the vectors of all features, as a model makes it.

    Args:
        outputs: by feature, `[B, D]` each, or of sequences `[n, D]` or `[B, L, D]`.
    """
    if pooled:
        return torch.cat(list(outputs), 1)
    alike = len({output.shape[-1] for output in outputs}) == 1
    return torch.cat([output.flatten(0, -2 if alike else -1) for output in outputs])


def learn(vectors: torch.Tensor) -> None:
    """A backward, in place of what a model makes of its vectors."""
    vectors.backward(torch.ones_like(vectors))
