"""One start of a model, timed by stage; `bench.startup` runs this file in a process of its own for each rank.

What each library imports is part of what is timed: so this is run by its text and not by its name, which would import the package.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("import", "plan and build", "first step")
TORCH = "import of torch alone"  # a part of the first stage
TABLES, ROWS, COLUMNS, SAMPLES = 26, 100_000, 16, 64


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def start(self) -> None:
        """Leave out what came since the last stage."""
        self._began = time.perf_counter()

    def end(self, stage: str) -> None:
        self.note(stage)
        self.start()

    def note(self, part: str) -> None:
        """Seconds since the last stage, which goes on."""
        self.seconds[part] = time.perf_counter() - self._began


def shardembed() -> dict[str, float]:
    clock = Clock()
    import torch
    from torch import nn

    clock.note(TORCH)
    import shardembed as se

    clock.end("import")
    torch.set_num_threads(1)
    se.init()
    clock.start()
    tables = [se.TableConfig(f"t{i}", ROWS, COLUMNS) for i in range(TABLES)]
    emb = se.EmbeddingCollection(tables, optimizer=se.optim.RowwiseAdagrad(lr=0.01), plan="auto")
    dense = nn.Sequential(nn.Linear(TABLES * COLUMNS, 64), nn.ReLU(), nn.Linear(64, 1))
    model = nn.ModuleDict({"emb": emb, "dense": dense})
    optimizer = se.Optimizer(model, dense=torch.optim.SGD(dense.parameters(), lr=0.01))
    clock.end("plan and build")
    ids = torch.randint(0, ROWS, (TABLES, SAMPLES, 1))
    out = emb({f"t{i}": ids[i] for i in range(TABLES)})
    dense(torch.cat(list(out.values()), 1)).mean().backward()
    optimizer.step()
    clock.end("first step")
    return clock.seconds


def torchrec() -> dict[str, float]:
    import logging

    logging.disable(logging.WARNING)
    clock = Clock()
    import torch

    clock.note(TORCH)
    import torch.distributed as dist
    import torchrec
    from torch import nn
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.types import ShardingEnv
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    clock.end("import")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    clock.start()
    names = [f"t{i}" for i in range(TABLES)]
    configs: Any = [
        torchrec.EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=ROWS, embedding_dim=COLUMNS) for name in names
    ]
    collection = torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=configs)
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
    ranks = dist.get_world_size()
    topology = Topology(world_size=ranks, local_world_size=ranks, compute_device="cpu")
    wrapped = nn.ModuleDict({"tables": collection})
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder

    sharders: Any = [EmbeddingBagCollectionSharder()]
    plan = EmbeddingShardingPlanner(topology=topology).collective_plan(wrapped, sharders, group)
    model: Any = DistributedModelParallel(
        wrapped, env=ShardingEnv.from_process_group(group), device=torch.device("cpu"), plan=plan, sharders=sharders
    )
    dense = nn.Sequential(nn.Linear(TABLES * COLUMNS, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.01)
    clock.end("plan and build")
    ids = torch.randint(0, ROWS, (TABLES * SAMPLES,))
    lengths = torch.ones(TABLES * SAMPLES, dtype=torch.int64)
    out = model.module["tables"](torchrec.KeyedJaggedTensor(keys=names, values=ids, lengths=lengths)).wait()
    dense(out.values()).mean().backward()
    optimizer.step()
    clock.end("first step")
    dist.destroy_process_group()
    return clock.seconds


if __name__ == "__main__":
    found = {"shardembed": shardembed, "TorchRec": torchrec}[sys.argv[1]]()
    Path(sys.argv[2]).write_text(json.dumps(found))
