"""TorchRec's `DistributedModelParallel`, in the configurations that work on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.contenders import AUTO, KINDS, joined, learn
from benchmarks.crew import Contender
from benchmarks.peers import LR
from benchmarks.tasks import Batch, Flat, Task
from shardembed.kernels.memory import keep_freed_memory
from shardembed.tables.pooling import Pooling

NAME = "TorchRec"
POOLED: set[Pooling] = {"sum", "mean", None}  # what its collections pool by


def variants(task: Task, full: bool) -> dict[str, dict[str, bool]]:
    """Its settings by name. Sequences also as bags of one id each, since its collection for sequences is slow."""
    found: dict[str, dict[str, bool]] = {NAME: {}}
    if not task.pooled:
        found[f"{NAME}, as bags of one id"] = {"as_bags": True}
    if full:
        found[f"{NAME}, freed memory kept"] = {"keep_memory": True}
        found[f"{NAME}, bfloat16 wire"] = {"narrow": True}
    return found


class OneModule(nn.Module):
    """A model of tables alone, since its plan has to name a child."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, ids: Any) -> Any:
        return self.tables(ids)


def torchrec_step(
    task: Task, kind: str, batches: Sequence[Batch], *, as_bags: bool = False, narrow: bool = False, keep_memory: bool = False
) -> Contender | str:
    """Forward of a KeyedJaggedTensor, and backward with its fused rowwise Adagrad.

    Args:
        as_bags: a collection of bags, each id a bag of its own. keep_memory: as `se.init` has it for ours.
    """
    import torchrec
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    if len({pooling is None for pooling in task.poolings}) > 1 or task.poolings - POOLED:
        return "a collection of its pools all features or none, by sum or mean"
    if keep_memory:
        keep_freed_memory()
    dist.init_process_group("gloo")
    pooled = task.pooled or as_bags
    meta = torch.device("meta")
    if pooled:
        collection: Any = torchrec.EmbeddingBagCollection(device=meta, tables=[_bag_config(table) for table in task.tables])
    else:
        shapes = [_shape(table) for table in task.tables]
        collection = torchrec.EmbeddingCollection(device=meta, tables=[torchrec.EmbeddingConfig(**shape) for shape in shapes])
    apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": LR})
    model = _sharded(collection, task, kind, narrow)
    features = task.features

    def step(flat: Flat) -> None:
        out = model(torchrec.KeyedJaggedTensor(keys=features, values=flat.ids, lengths=flat.lengths))
        out = out.wait() if hasattr(out, "wait") else out
        learn(out.values() if pooled else joined([out[name].values() for name in features], pooled))

    return Contender(step, [Flat.of(batch, features, one_an_id=as_bags) for batch in batches])


def _shape(table: Any) -> dict[str, Any]:
    names = list(table.feature_names)
    return {
        "name": table.name,
        "feature_names": names,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
    }


def _bag_config(table: Any) -> Any:
    import torchrec

    how = {table.pooling_of(name) for name in table.feature_names}
    if len(how) > 1:
        raise ValueError(f"table {table.name!r}: its features are pooled in several ways")
    return torchrec.EmbeddingBagConfig(**_shape(table), pooling=torchrec.PoolingType[(how.pop() or "sum").upper()])


def _sharded(collection: Any, task: Task, kind: str, narrow: bool) -> Any:
    """The collection cut over the ranks; `AUTO` asks its planner."""
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    group, ranks = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    codecs = _codecs() if narrow else None
    bags = type(collection).__name__ == "EmbeddingBagCollection"
    sharder: Any = (EmbeddingBagCollectionSharder if bags else EmbeddingCollectionSharder)(qcomm_codecs_registry=codecs)
    model = OneModule(collection)
    if kind == AUTO:
        topology = Topology(world_size=ranks, local_world_size=ranks, compute_device="cpu")
        whole = EmbeddingShardingPlanner(topology=topology, batch_size=task.samples).collective_plan(model, [sharder], group)
    else:
        cuts = {table.name: _cut(kind, i, ranks) for i, table in enumerate(task.tables)}
        plan = construct_module_sharding_plan(collection, cuts, sharder, local_size=ranks, world_size=ranks, device_type="cpu")
        whole = ShardingPlan({"tables": plan})
    environment = ShardingEnv.from_process_group(group)
    return DistributedModelParallel(model, env=environment, device=torch.device("cpu"), plan=whole, sharders=[sharder])


def _codecs() -> Any:
    from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

    config = QCommsConfig(forward_precision=CommType.BF16, backward_precision=CommType.BF16)
    return get_qcomm_codecs_registry(config, device=torch.device("cpu"))


def _cut(kind: str, number: int, ranks: int) -> Any:
    """As `contenders.placement`."""
    from torchrec.distributed.sharding_plan import column_wise, row_wise, table_wise

    if kind == "mixed":
        return _cut(KINDS[number % 3], number // 3, ranks)
    if kind == "row_wise":
        return row_wise()
    return table_wise(rank=number % ranks) if kind == "table_wise" else column_wise(ranks=list(range(ranks)))
