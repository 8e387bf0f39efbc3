"""Contenders of `shardembed bench dynamic`: one table, looked up by ids of 64 bits, or by rows.

A table is full before anything is timed: all ids of it have come, in random order, and to those with a limit strangers beside them,
so that newcomers push somebody out.

Legend: N ids of a batch.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import shardembed as se
from benchmarks.contenders import learn
from benchmarks.crew import Contender
from benchmarks.rounds import barrier
from benchmarks.tasks import Batch, Task
from shardembed.kernels.mixing import mixed

NEW = 0.075  # of the distinct ids of a batch with newcomers
SALT = 0x5EED
LIMIT = 1 << 62  # of ids that TorchRec gets, which deals them out to the ranks in blocks
STRANGERS = 0.25  # of the capacity, that come after all of a table's own ids
Call = Callable[[torch.Tensor, torch.Tensor], None]  # a step, on ids and offsets


@dataclass(frozen=True)
class Ids:
    """What this rank looks up.

    Attributes:
        rows: of each batch, as the workload draws them: the most popular is 0.
        offsets: of all batches.
        names: of each row what it is looked up by; numbers behind them are newcomers, to a dense table some row.
        capacity: rows of the table.
        rank, ranks: of the job.
    """

    rows: list[torch.Tensor]
    offsets: torch.Tensor
    names: Callable[[torch.Tensor], torch.Tensor]
    capacity: int
    rank: int
    ranks: int

    def warm(self, number: int) -> torch.Tensor:
        return self.names(self.rows[number % len(self.rows)])

    def with_newcomers(self, number: int) -> torch.Tensor:
        """Some of the distinct ids are replaced by ones that never came."""
        rows = self.rows[number % len(self.rows)]
        rows_U, inverse = rows.unique(return_inverse=True)
        draw = torch.Generator().manual_seed(number)
        strangers = self.capacity * 2 + (number * self.ranks + self.rank) * rows.numel() + torch.arange(rows_U.numel())
        return self.names(torch.where(torch.rand(rows_U.numel(), generator=draw) < NEW, strangers, rows_U)[inverse])

    def everyone(self, strangers: float) -> Iterator[torch.Tensor]:
        """This rank's part of all ids, in batches and in random order; then of strangers."""
        size, every = self.rows[0].numel(), int(self.capacity * (1 + strangers))
        order = torch.cat(
            [torch.randperm(self.capacity, generator=torch.Generator().manual_seed(1)), torch.arange(self.capacity, every)]
        )
        mine = order[self.rank :: self.ranks][: every // self.ranks]
        for part in mine.split(size):
            yield self.names(torch.cat([part, part[:1].expand(size - part.numel())]))


def ids_of(batches: Sequence[Batch], task: Task, names: Callable[[torch.Tensor], torch.Tensor]) -> Ids:
    ((_, offsets),) = batches[0].values()
    rows = [ids for batch in batches for ids, _ in batch.values()]
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Ids(rows, offsets, names, task.tables[0].num_embeddings, rank, ranks)


def as_ids(rows: torch.Tensor) -> torch.Tensor:
    """Any int64."""
    return mixed(rows + SALT)


def by_popularity(rows: torch.Tensor, capacity: int) -> torch.Tensor:
    return rows % capacity


def shuffled(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return order[rows % order.numel()]


def ours(task: Task, dynamic: Any, sorted_rows: bool, batches: Sequence[Batch]) -> Contender:
    """A table of ours.

    Args:
        dynamic: settings and num_embeddings; None is a dense table.
        sorted_rows: of a dense one, the popular rows lie side by side.
    """
    se.init()
    table, load = task.tables[0], task.workload.tables[0]
    rows, name = table.num_embeddings, table.feature_names[0] if table.feature_names else table.name
    settings, limit = dynamic or (None, rows)
    config = se.TableConfig(table.name, limit, table.embedding_dim, pooling="sum", dynamic=settings)
    emb = se.EmbeddingCollection([config], optimizer=load.optimizer, plan={table.name: se.row_wise()})
    optimizer = se.Optimizer(emb)

    def step(ids: torch.Tensor, offsets: torch.Tensor) -> None:
        learn(emb({name: (ids, offsets)})[name])
        optimizer.step()
        optimizer.zero_grad()

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(2))
    names = as_ids if settings else (lambda of: by_popularity(of, rows)) if sorted_rows else (lambda of: shuffled(of, order))
    ids = ids_of(batches, task, names)
    for part in ids.everyone(STRANGERS if limit else 0.0) if settings else ():
        step(part, ids.offsets)
    return Contender(lambda given: step(*given), Given(ids), None, emb)


def zch(task: Task, policy: str, interval: int, batches: Sequence[Batch]) -> Contender:
    """TorchRec's managed collisions before its sharded table, with a fused optimizer.

    On one rank the map is a module in front, and rows keep what was in them when another id gets them: sharded together with the
    table, as it has to be on several ranks, it calls an operator that is not there for the CPU as soon as an id gets a row.
    """
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.mc_embeddingbag import ManagedCollisionEmbeddingBagCollectionSharder
    from torchrec.modules import mc_modules
    from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    _join()
    table, cpu, together = task.tables[0], torch.device("cpu"), dist.get_world_size() > 1
    name, rows = (table.feature_names or (table.name,))[0], table.num_embeddings
    config = EmbeddingBagConfig(name=table.name, feature_names=[name], num_embeddings=rows, embedding_dim=table.embedding_dim)
    bags = EmbeddingBagCollection(device=torch.device("meta"), tables=[config])
    apply_optimizer_in_backward(RowWiseAdagrad, bags.parameters(), {"lr": 0.01})
    eviction = getattr(mc_modules, f"{policy}_EvictionPolicy")()
    module = mc_modules.MCHManagedCollisionModule(rows, cpu, eviction, interval, input_hash_size=LIMIT)
    managed = mc_modules.ManagedCollisionCollection({table.name: module}, [config])
    if together:
        model = _sharded(
            ManagedCollisionEmbeddingBagCollection(bags, managed), ManagedCollisionEmbeddingBagCollectionSharder(), table.name
        )
    else:
        model = _sharded(bags, EmbeddingBagCollectionSharder(), table.name)

    def step(ids: torch.Tensor, offsets: torch.Tensor) -> None:
        given = KeyedJaggedTensor(keys=[name], values=ids, lengths=offsets.diff())
        out = model(given if together else managed(given))
        out = out[0] if together else out
        learn((out.wait() if hasattr(out, "wait") else out).values())

    ids = ids_of(batches, task, lambda rows: as_ids(rows) & (LIMIT - 1))
    for part in ids.everyone(0.0):
        step(part, ids.offsets)
    return Contender(lambda given: step(*given), Given(ids))


def _sharded(module: Any, sharder: Any, table: str) -> Any:
    """A collection cut row-wise."""
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    from benchmarks.peer_torchrec import OneModule

    group, ranks = dist.group.WORLD, dist.get_world_size()
    assert group is not None
    plan = construct_module_sharding_plan(
        module, {table: row_wise()}, sharder, local_size=ranks, world_size=ranks, device_type="cpu"
    )
    return DistributedModelParallel(
        OneModule(module),
        env=ShardingEnv.from_process_group(group),
        device=torch.device("cpu"),
        plan=ShardingPlan({"tables": plan}),
        sharders=[sharder],
    )


def _join() -> None:
    """As a job of one rank, where there is no other."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


class Given(Sequence[Any]):
    """Ids and offsets as a step takes them, made when they are asked for: warm ones for numbers below 0, else with newcomers."""

    def __init__(self, ids: Ids) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return 1 << 62

    def __getitem__(self, number: Any) -> Any:
        ids = self.ids.warm(-number) if number <= 0 else self.ids.with_newcomers(number)
        return ids, self.ids.offsets


@dataclass(frozen=True)
class Timed:
    """Of one step: milliseconds by the clock, and of processor time, also by stage, of one rank."""

    wall: float
    cpu: float
    stages: dict[str, float]


def turn(contender: Contender, numbers: Sequence[int], uncounted: int) -> list[Timed]:
    """Steps on batches of these numbers, of which the first do not count. All ranks of the contender at once."""
    given = [contender.batches[number] for number in numbers]
    spent: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        finally:
            spent[name] += 1e3 * (time.thread_time() - began)

    if contender.emb is not None:
        contender.emb.journey.watch(stage)
    found = []
    for batch in given:
        barrier()
        spent.clear()
        began, cpu = time.perf_counter(), time.process_time()
        contender.step(batch)
        used = time.process_time() - cpu
        barrier()
        found.append(Timed(1e3 * (time.perf_counter() - began), 1e3 * used, dict(spent)))
    return found[uncounted:]


def memory(contender: Contender) -> tuple[int, int, int]:
    """(ids that live here, bytes beside rows and state, created and evicted) of a dynamic table of ours; nothing of others."""
    keys = contender.emb.journey.slabs[0].dynamic if contender.emb is not None else None
    if keys is None:
        return 0, 0, 0
    return keys.census.living(keys.steps).numel(), keys.census.nbytes, keys.tally.evicted


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else 0.0
