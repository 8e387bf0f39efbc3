"""TorchRec on many ranks, none of which is there: its sharded modules over a process group that hands back what is sent.

In a process of its own for each number of ranks, since torch has one default group a process:

    python -m benchmarks.peer_ranks FILE

FILE says what to measure (`in_a_process`), and gets the seconds.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future

from benchmarks import jobs
from benchmarks.options import Options
from benchmarks.own_work import WIDTH, Case, Figures

NAME = "TorchRec"
PARTS = ("input dist", "lookup", "output dist", "backward and update")
MOST_RANKS = 1024
ABOUT = (
    "DistributedModelParallel with one EmbeddingBagCollection, `row_wise()` and the fused update of FBGEMM, on the same ids, over "
    "a process group that hands back what it is given, each number of ranks in a process of its own. `input dist` cuts a "
    "KeyedJaggedTensor that was made before by owner, exchanges splits, lengths and ids, and puts what came into the order of "
    "features. `output dist` is the reduce-scatter, of which only the copy of this rank's share is counted: the sum over what "
    "others send is left out, as the network is. Each rank looks up and sends a vector for every bag of all ranks, which is most "
    f"of the time on many. More than {MOST_RANKS:,} ranks are left out: they take gigabytes."
)


_ProcessGroup: Any = dist.ProcessGroup  # whose declared methods take arguments that nobody here looks at


class EchoGroup(_ProcessGroup):
    """Rank 0 of many: whoever is asked answers what was said."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._size = size

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:
        return "echo"

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def all_to_all_single(self, output: torch.Tensor, given: torch.Tensor, *sizes_and_options: Any) -> Any:
        output.view(-1)[: given.numel()].copy_(given.view(-1))
        return _done(output)

    def reduce_scatter_single(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> Any:
        output.view(-1).copy_(given.view(-1)[: output.numel()])
        return _done(output)

    def all_gather_single(self, output: torch.Tensor, given: torch.Tensor, *options: Any) -> Any:
        output.view(self._size, -1).copy_(given.view(1, -1))
        return _done(output)

    def allgather(self, outputs: Any, given: Any, *options: Any) -> Any:
        for output in outputs[0]:
            output.copy_(given[0])
        return _done(outputs)

    def allreduce(self, tensors: Any, *options: Any) -> Any:
        return _done(tensors)

    def broadcast(self, tensors: Any, *options: Any) -> Any:
        return _done(tensors)

    def scatter(self, outputs: Any, given: Any, *options: Any) -> Any:
        outputs[0].copy_(given[0][0])
        return _done(outputs)

    def barrier(self, *options: Any) -> Any:
        return _done(torch.zeros(1))

    # The same by the names of older versions of torch.
    alltoall_base = all_to_all_single
    _reduce_scatter_base = reduce_scatter_single
    _allgather_base = all_gather_single


def _done(result: Any) -> Any:
    future: Future[Any] = Future()
    future.set_result(result)
    return _create_work_from_future(future)


def in_a_process(case: Case, ranks: int, options: Options) -> list[Figures] | str:
    """Seconds by part of each timed step, or why there are none."""
    if importlib.util.find_spec("torchrec") is None:
        return "TorchRec is not installed"
    asked = {"case": case.__dict__, "ranks": ranks, "rounds": options.rounds, "steps": options.steps}
    try:
        return jobs.in_a_process("benchmarks.peer_ranks", asked, keep_errors=True)
    except subprocess.CalledProcessError as error:
        return (error.stderr.strip().splitlines() or [str(error)])[-1]


def main() -> None:
    told = Path(sys.argv[1])
    asked = json.loads(told.read_text())
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    told.write_text(json.dumps(measure(Case(**asked["case"]), asked["ranks"], asked["rounds"], asked["steps"])))


def measure(case: Case, ranks: int, rounds: int, steps: int) -> list[Figures]:
    """Seconds by part of `rounds` times `steps` steps, after one round that warms up."""
    dist.Backend.register_backend("echo", lambda store, rank, size, timeout: EchoGroup(rank, size), devices=["cpu"])
    dist.init_process_group("echo", rank=0, world_size=ranks, store=dist.HashStore())
    model, batches = Model(case, ranks), case.batches(ranks)
    taken = [model.step(batches[number % len(batches)]) for number in range((rounds + 1) * steps)]
    return taken[steps:]


class Model:
    """The collection as rank 0 has it."""

    def __init__(self, case: Case, ranks: int) -> None:
        import torchrec
        from torchrec.distributed import DistributedModelParallel
        from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
        from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
        from torchrec.distributed.types import ShardingEnv, ShardingPlan
        from torchrec.optim import RowWiseAdagrad
        from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

        self._names = [f"t{i}" for i in range(case.tables)]
        configs = [
            torchrec.EmbeddingBagConfig(name=name, feature_names=[name], num_embeddings=case.rows * ranks, embedding_dim=WIDTH)
            for name in self._names
        ]
        collection: Any = torchrec.EmbeddingBagCollection(device=torch.device("meta"), tables=configs)
        apply_optimizer_in_backward(RowWiseAdagrad, collection.parameters(), {"lr": 0.01})
        cuts = {name: row_wise() for name in self._names}
        sharder: Any = EmbeddingBagCollectionSharder()
        plan = construct_module_sharding_plan(collection, cuts, sharder, local_size=ranks, world_size=ranks, device_type="cpu")
        group = dist.group.WORLD
        assert group is not None
        model: Any = DistributedModelParallel(
            nn.ModuleDict({"tables": collection}),
            env=ShardingEnv.from_process_group(group),
            device=torch.device("cpu"),
            plan=ShardingPlan({"tables": plan}),
            sharders=[sharder],
        )
        self._keyed, self._sharded = torchrec.KeyedJaggedTensor, model.module["tables"]
        self._grad = torch.ones(case.samples, WIDTH * case.tables)

    def step(self, batch: dict[str, torch.Tensor]) -> Figures:
        lengths = torch.cat([torch.full((len(ids),), ids.numel() // len(ids)) for ids in batch.values()])
        keyed = self._keyed(keys=self._names, values=torch.cat([ids.view(-1) for ids in batch.values()]), lengths=lengths)
        sharded, marks = self._sharded, [time.process_time()]
        context = sharded.create_context()
        arrived = sharded.input_dist(context, keyed).wait().wait()
        marks.append(time.process_time())
        found = sharded.compute(context, arrived)
        marks.append(time.process_time())
        output = sharded.output_dist(context, found).wait().values()
        marks.append(time.process_time())
        output.backward(self._grad)
        marks.append(time.process_time())
        return {part: after - before for part, before, after in zip(PARTS, marks[:-1], marks[1:], strict=True)}


if __name__ == "__main__":
    main()
