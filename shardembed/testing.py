"""Check a model of your own: `compare` trains it unsharded and sharded side by side and says where they part."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from shardembed.convert import shard
from shardembed.convert.find import find_sites
from shardembed.convert.sites import Table, tables_of
from shardembed.errors import ConfigError
from shardembed.modules.base import ShardedModule
from shardembed.modules.build import TableOptimizers, optimizer_of
from shardembed.optim import SGD, Adagrad, Adam
from shardembed.optimizer import Optimizer
from shardembed.store.slab import Slab
from shardembed.tables.plan import PlanLike
from shardembed.tables.table_config import TableConfig

Loss = Callable[[Any, Any], torch.Tensor]
DEFAULT = SGD(lr=0.1)


@dataclass(frozen=True)
class Report:
    """What `compare` found; true when nothing differs.

    Attributes:
        stage: the first thing that differs, such as "weights of user after step 0"; "" when nothing does.
        text: in words, which rows of it and how much.
    """

    stage: str
    text: str

    def __bool__(self) -> bool:
        return not self.stage

    def __str__(self) -> str:
        return self.text


def compare(
    build: Callable[[], nn.Module],
    batches: Sequence[Any],
    ranks: int = 2,
    *,
    loss: Loss | None = None,
    optimizer: TableOptimizers = DEFAULT,
    dense_lr: float = 0.1,
    plan: PlanLike = "auto",
    inputs: Callable[..., Mapping[str, Any]] | None = None,
    rtol: float = 1e-4,
    atol: float = 1e-5,
    timeout: float = 60.0,
) -> Report:
    """Train `build()` in this process, and sharded over `ranks` new ones, from the same weights on the same batches; report the
    first difference: in an output, in a table's gradient, or in the weights after a step.

    The ranks are processes on this machine (CPU, Gloo), which find what they are given by its name: it must stand at the top of
    a module, and a script must call this under `if __name__ == "__main__":`. The model must be deterministic: no dropout.

    Args:
        build: makes the unsharded model, with whatever `shard` takes.
        batches: global batches, one a step: a tensor, or a tuple, list or dict of tensors, which the model takes as its arguments.
            Each tensor is cut along its first dimension into equal parts, one a rank.
        loss: of the model's output and its batch, a mean over samples. By default the model returns its loss itself.
        optimizer: of the tables: SGD, Adagrad or Adam from `se.optim`, one or a dict by name or pattern. Here their counterparts
            in torch.optim stand for them (SGD, Adagrad, SparseAdam). Dense parameters are stepped by `torch.optim.SGD(dense_lr)`.
        plan, inputs: as in `shard`.
        rtol, atol: how close is equal; with a float64 model, 1e-10 is.
        timeout: seconds after which ranks that wait for each other give up.

    Raises:
        ConfigError: a batch that cannot be cut evenly, an optimizer without counterpart, or something ranks cannot find by name.
    """
    job = _Job(build, loss, optimizer, dense_lr, plan, inputs, timeout)
    try:
        pickle.dumps(job)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(f"ranks are new processes, and cannot get this ({error}): define it at the top of a module") from error
    shares = [[_share(batch, number, rank, ranks) for number, batch in enumerate(batches)] for rank in range(ranks)]
    expected = list(_unsharded(job, batches))
    for stage, parts in zip(expected, zip(*_spawn(ranks, job, shares), strict=True), strict=True):
        found = _JOIN[stage.join](list(parts))
        if text := _difference(stage, found, rtol, atol):
            return Report(stage.name, text)
    return Report("", f"all agree: {len(batches)} step(s), {len(expected)} tensors, unsharded and on {ranks} rank(s)")


@dataclass(frozen=True)
class _Job:
    build: Callable[[], nn.Module]
    loss: Loss | None
    optimizer: TableOptimizers
    dense_lr: float
    plan: PlanLike
    inputs: Callable[..., Mapping[str, Any]] | None
    timeout: float

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def run(self, model: nn.Module, batch: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(the tensors of the output, the loss)"""
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
        loss = output if self.loss is None else self.loss(output, batch)
        return [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)], loss


Join = Literal["mean", "samples", "sum", "same"]
_JOIN: dict[Join, Callable[[list[torch.Tensor]], torch.Tensor]] = {
    "mean": lambda parts: torch.stack(parts).mean(0),
    "samples": torch.cat,
    "sum": lambda parts: torch.stack(parts).sum(0),
    "same": lambda parts: parts[0],
}


@dataclass(frozen=True)
class _Stage:
    """A tensor of the unsharded run, and how the ranks' tensors are put together to compare with it."""

    name: str
    join: Join
    tensor: torch.Tensor


def _share(batch: Any, number: int, rank: int, ranks: int) -> Any:
    def cut(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or not tensor.dim() or len(tensor) % ranks:
            size = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ConfigError(f"batch {number}: {size} cannot be cut into {ranks} equal parts along its first dimension")
        return tensor.tensor_split(ranks)[rank]

    return pytree.tree_map(cut, batch)


def _unsharded(job: _Job, batches: Sequence[Any]) -> Iterator[_Stage]:
    model = job.model()
    tables = tables_of(model, find_sites(model, ()))
    optimizers = [_counterpart(table, job.optimizer) for table in tables if table.weight.requires_grad]
    weights = {table.name: table.weight for table in tables}
    dense = _dense(model, weights)
    if dense:
        optimizers.append(torch.optim.SGD(dense.values(), lr=job.dense_lr))
    for number, batch in enumerate(batches):
        model.zero_grad()
        outputs, loss = job.run(model, batch)
        for index, output in enumerate(outputs):
            name = f"output{f' {index}' if len(outputs) > 1 else ''} in step {number}"
            yield _Stage(name, "mean" if job.loss is None or not output.dim() else "samples", output)
        loss.backward()
        for name, weight in weights.items():
            grad = torch.zeros_like(weight) if weight.grad is None else weight.grad.to_dense()
            yield _Stage(f"gradient of {name} in step {number}", "sum", grad.clone())
        for optimizer in optimizers:
            optimizer.step()
        for name, weight in [*weights.items(), *dense.items()]:
            yield _Stage(f"weights of {name} after step {number}", "same", weight.detach().clone())


def _dense(model: nn.Module, tables: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    own = {id(weight) for weight in tables.values()}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in own}


def _counterpart(table: Table, wanted: TableOptimizers) -> torch.optim.Optimizer:
    settings = optimizer_of(table.name, wanted)
    if (make := COUNTERPARTS.get(type(settings))) is not None:
        return make(table, settings)
    what = f"{type(settings).__name__} has no counterpart in torch.optim" if settings else "an optimizer is needed"
    *others, last = (kind.__name__ for kind in COUNTERPARTS)
    raise ConfigError(f"table {table.name!r}: {what}; compare with {', '.join(others)} or {last}")


def _sgd(table: Table, settings: SGD) -> torch.optim.Optimizer:
    return torch.optim.SGD([table.weight], lr=settings.lr)


def _adagrad(table: Table, settings: Adagrad) -> torch.optim.Optimizer:
    return torch.optim.Adagrad([table.weight], lr=settings.lr, eps=settings.eps)


def _sparse_adam(table: Table, settings: Adam) -> torch.optim.Optimizer:
    for use in table.uses:  # what SparseAdam asks for
        use.module.sparse = True
    return torch.optim.SparseAdam([table.weight], lr=settings.lr, betas=settings.betas, eps=settings.eps)


# Those of torch.optim that leave rows alone which no batch named; an optimizer of ours may have none.
COUNTERPARTS: dict[type, Callable[[Table, Any], torch.optim.Optimizer]] = {SGD: _sgd, Adagrad: _adagrad, Adam: _sparse_adam}


def _spawn(ranks: int, job: _Job, shares: list[list[Any]]) -> list[list[torch.Tensor]]:
    """`_sharded` on new processes, rank by rank."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # bound here, so that no port is guessed
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_in_rank, (ranks, job, shares, store.port, folder), nprocs=ranks)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]


def _in_rank(rank: int, ranks: int, job: _Job, shares: list[list[Any]], port: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=job.timeout))
    try:
        torch.save(list(_sharded(job, shares[rank])), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _sharded(job: _Job, batches: Sequence[Any]) -> Iterator[torch.Tensor]:
    """The tensors of `_unsharded`'s stages, as this rank sees them."""
    model = job.model()
    shard(model, optimizer=job.optimizer, plan=job.plan, inputs=job.inputs, device="cpu", verbose=False)
    found = [module for module in model.modules() if isinstance(module, ShardedModule)]
    modules = {table.name: module for module in found for table in module.tables}
    dense = dict(model.named_parameters())
    learns = any(parameter.requires_grad for parameter in dense.values())
    wrapped = DistributedDataParallel(model) if learns else model
    optimizer = Optimizer(model, dense=torch.optim.SGD(dense.values(), lr=job.dense_lr) if dense else None)
    for batch in batches:
        outputs, loss = job.run(wrapped, batch)
        yield from outputs
        loss.backward()
        for name, module in modules.items():
            yield _waiting(module, name)
        optimizer.step()
        optimizer.zero_grad()
        for name, module in modules.items():
            yield module.rows(name, torch.arange(_table(module, name).num_embeddings))
        yield from (parameter.detach().clone() for parameter in dense.values())


def _table(module: ShardedModule, name: str) -> TableConfig:
    return next(table for table in module.tables if table.name == name)


def _waiting(module: ShardedModule, name: str) -> torch.Tensor:
    """This rank's share of a table's gradient, as a whole table."""
    table = _table(module, name)
    grad = torch.zeros(table.num_embeddings, table.embedding_dim, dtype=table.dtype)
    for slab in module.journey.slabs:
        _add_waiting(grad, slab, table.name)
    return grad


def _add_waiting(grad: torch.Tensor, slab: Slab, table: str) -> None:
    keys_U, grads_UW = slab.merged()
    for local in slab.shards():
        if local.table == table:
            rows = local.shard.rows
            inside = (keys_U >= local.first_key) & (keys_U < local.first_key + len(rows))
            numbers = rows.start + (keys_U[inside] - local.first_key) * rows.step
            grad[numbers, local.shard.columns.start : local.shard.columns.stop] = grads_UW[inside].to(grad.dtype)


def _difference(stage: _Stage, found: torch.Tensor, rtol: float, atol: float) -> str:
    """Where and how much `found` differs; "" when it does not."""
    expected = stage.tensor.detach()
    if found.shape != expected.shape:
        return f"{stage.name}: shape {tuple(found.shape)} sharded, {tuple(expected.shape)} unsharded"
    wrong = ~torch.isclose(found.double(), expected.double(), rtol=rtol, atol=atol)
    if not wrong.any():
        return ""
    if not expected.dim():
        return f"{stage.name}: {float(found):.6g} sharded, {float(expected):.6g} unsharded"
    gap = torch.where(wrong, (found.double() - expected.double()).abs(), 0.0)
    at = tuple(int(i) for i in torch.unravel_index(gap.nan_to_num(torch.inf).argmax(), gap.shape))
    rows = wrong.reshape(len(wrong), -1).any(1).nonzero().squeeze(1).tolist()
    shown = f"{rows[:8]}{' and more' if len(rows) > 8 else ''}"
    return (
        f"{stage.name}: {len(rows)} of {len(wrong)} rows differ, {shown}; by {float(gap[at]):.3g} at {list(at)}: "
        f"{float(found[at]):.6g} sharded, {float(expected[at]):.6g} unsharded"
    )
