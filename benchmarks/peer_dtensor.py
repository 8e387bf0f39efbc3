"""DTensor: `nn.Embedding` under `parallelize_module` with `RowwiseParallel`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.contenders import joined, learn
from benchmarks.crew import Contender
from benchmarks.peers import LR
from benchmarks.tasks import Batch, Task


def dtensor(task: Task, batches: Sequence[Batch]) -> Contender | str:
    """Every rank looks up its own samples: ids are gathered, partial vectors reduced and scattered."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    single = all(length == 1 for load in task.workload.tables for length in load.ids_per_sample)
    if task.pooled and not single:
        return "its rows are cut for nn.Embedding alone, which sums no bags"
    if any(length % 1 for load in task.workload.tables for length in load.ids_per_sample):
        return "the ranks have different numbers of ids, which it cannot gather"
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    modules = nn.ModuleDict({table.name: nn.Embedding(table.num_embeddings, table.embedding_dim) for table in task.tables})
    for module in modules.values():
        parallelize_module(module, mesh, RowwiseParallel(input_layouts=Shard(0), output_layouts=Shard(0)))
    optimizer = torch.optim.Adagrad(modules.parameters(), lr=LR)
    called = [(modules[table.name], name) for table in task.tables for name in table.feature_names or ()]

    def step(batch: Batch) -> None:
        learn(joined([module(batch[name][0]) for module, name in called], task.pooled))
        optimizer.step()
        optimizer.zero_grad()

    return Contender(step, batches)
