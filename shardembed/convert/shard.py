"""`shard(model)`: swap a model's `nn.Embedding`s and `nn.EmbeddingBag`s for sharded ones, in place, names and weights kept.

Without `inputs` each table makes a journey of its own. With `inputs`, a hook runs one journey for all tables just before the
model's forward, and each module then hands out its part.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from shardembed.comm import Comm
from shardembed.errors import ConfigError, PlanError, StepError, UnsupportedError
from shardembed.journey import Journey
from shardembed.modules import Embedding, EmbeddingBag, EmbeddingCollection
from shardembed.modules.base import ShardedModule, TableOptimizers
from shardembed.modules.single import refuse
from shardembed.optim import TableOptimizer
from shardembed.plan import Plan, PlanLike
from shardembed.tables import Constant, Pooling, TableConfig

Model = TypeVar("Model", bound=nn.Module)
Plain = nn.Embedding | nn.EmbeddingBag
CHUNK_BYTES = 64 * 1024 * 1024
log = logging.getLogger("shardembed")


def shard(
    model: Model,
    *,
    optimizer: TableOptimizers | None = None,
    plan: PlanLike = "auto",
    inputs: Callable[..., Mapping[str, Any]] | None = None,
    wire_dtype: torch.dtype | None = None,
    update: str = "step",
    gradient_reduction: str = "mean",
    device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
    kernel: str = "auto",
) -> Model:
    """Cut every `nn.Embedding` and `nn.EmbeddingBag` of `model` over the ranks, in place; returns the model. Collective.

    Weights are rank 0's, broadcast in pieces of 64 MiB, so that all ranks start alike whatever their seeds. Tables are named by
    their module's path: in `plan`, in `optimizer` when it is a dict, in errors, and in the keys of `inputs`.

    Args:
        inputs: called with the arguments of the model's forward; returns, for each table's path, what that module is going to
            be called with: its ids, or `(ids, offsets [B + 1][, weights])` for bags. All tables then share one journey a step.
        optimizer, plan, wire_dtype, update, gradient_reduction, device, process_group, kernel: as in `EmbeddingCollection`.

    Raises:
        ConfigError: there is no table to shard. UnsupportedError: a table uses an argument that is not served yet; names its
            path.
        PlanError: the plan names a module that is not a table here.
    """
    if any(isinstance(module, ShardedModule) for module in model.modules()):
        raise ConfigError("the model has sharded tables already; shard it once, before wrapping it")
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)}
    if not found:
        raise ConfigError("the model has no nn.Embedding or nn.EmbeddingBag to shard")
    if "" in found:
        raise ConfigError("the model is itself a table; build se.Embedding or se.EmbeddingBag instead of converting it")
    for path, module in found.items():
        _check_plain(path, module)
    _check_names(plan, optimizer, set(found))
    common = {
        "optimizer": optimizer, "plan": plan, "wire_dtype": wire_dtype, "update": update,
        "gradient_reduction": gradient_reduction, "device": device, "process_group": process_group, "kernel": kernel,
    }  # fmt: skip
    comm = Comm.of(process_group)
    if inputs is None:
        if len(found) > 1:
            log.info("%d tables make a journey each; pass inputs= to shard() to let them share one", len(found))
        swapped = {path: _alone(path, module, common) for path, module in found.items()}
    else:
        collection = EmbeddingCollection([_config(path, module) for path, module in found.items()], **common)
        swapped = _together(model, collection, inputs)
    for path, module in found.items():
        _load_from_rank_zero(swapped[path], module.weight.data, comm)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, swapped[path])
    return model


def _config(path: str, module: Plain) -> TableConfig:
    pooling = cast(Pooling, module.mode) if isinstance(module, nn.EmbeddingBag) else None
    # The rows are overwritten right after: drawing them first would be a waste.
    return TableConfig(
        path, module.num_embeddings, module.embedding_dim, pooling=pooling, dtype=module.weight.dtype, init=Constant(0.0)
    )


def _alone(path: str, module: Plain, common: dict[str, Any]) -> ShardedModule:
    own = {**common, "plan": _plan_of(path, common["plan"]), "optimizer": _optimizer_of(path, common["optimizer"])}
    shape = {"num_embeddings": module.num_embeddings, "embedding_dim": module.embedding_dim, "dtype": module.weight.dtype}
    own.update(feature=path, init=Constant(0.0))
    if isinstance(module, nn.Embedding):
        return Embedding(**shape, **own)
    return EmbeddingBag(**shape, mode=cast(Any, module.mode), include_last_offset=module.include_last_offset, **own)


def _plan_of(path: str, plan: PlanLike) -> PlanLike:
    """The part of the plan that is about one table."""
    if isinstance(plan, Plan):
        return Plan(tuple(table for table in plan.tables if table.name == path), plan.world_size)
    if isinstance(plan, Mapping):
        return {path: plan[path]} if path in plan else "auto"
    return plan


def _optimizer_of(path: str, optimizer: TableOptimizers | None) -> TableOptimizer | None:
    return optimizer.get(path) if isinstance(optimizer, Mapping) else optimizer


class SharedTable(ShardedModule):
    """One table of a shared journey: hands out what the hook before the model's forward looked up for it."""

    def __init__(self, journey: Journey, table: TableConfig) -> None:
        super().__init__(journey, [table])
        self.path = table.name
        self.output: torch.Tensor | None = None

    def _weight_keys(self) -> dict[str, str]:
        return {"weight": self.path}

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """The vectors that `inputs` asked for. The arguments are not read again."""
        if self.output is None:
            raise StepError(
                f"{self.path} was called twice in a forward, or without the model's own forward: a shared journey looks each "
                "table up once a forward of the whole model; leave inputs= out of shard() for such a model"
            )
        output, self.output = self.output, None
        return output


def _together(
    model: nn.Module, collection: EmbeddingCollection, inputs: Callable[..., Mapping[str, Any]]
) -> dict[str, ShardedModule]:
    shared = {table.name: SharedTable(collection.journey, table) for table in collection.tables}

    def look_up(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        for path, output in collection(dict(inputs(*arguments, **named))).items():
            shared[path].output = output

    model.register_forward_pre_hook(look_up, with_kwargs=True)
    return {**shared}


def _load_from_rank_zero(table: ShardedModule, weight: torch.Tensor, comm: Comm) -> None:
    """Copy rank 0's weights into the shards of all ranks, a piece at a time."""
    locals_ = list(table.local_shards())
    step = max(1, CHUNK_BYTES // (weight.shape[1] * weight.element_size()))
    for first in range(0, weight.shape[0], step):
        piece = weight[first : first + step].detach().clone()
        comm.broadcast("broadcast weights", piece)
        for local in locals_:
            rows, columns = local.shard.rows, local.shard.columns
            begin = max(0, -(-(first - rows.start) // rows.step))
            inside = rows[begin : max(begin, -(-(first + piece.shape[0] - rows.start) // rows.step))]
            if inside:
                part = piece[inside.start - first : inside[-1] - first + 1 : rows.step, columns.start : columns.stop]
                local.weights[begin : begin + len(inside)].copy_(part)


def _check_names(plan: PlanLike, optimizer: TableOptimizers | None, paths: set[str]) -> None:
    planned = {table.name for table in plan.tables} if isinstance(plan, Plan) else set(plan if isinstance(plan, Mapping) else ())
    optimized = set(optimizer if isinstance(optimizer, Mapping) else ())
    for what, names in (("plan", planned), ("optimizer", optimized)):
        if unknown := sorted(names - paths):
            raise PlanError(f"the {what} names {unknown}, which are not tables of this model; its tables are {sorted(paths)}")


def _check_plain(path: str, module: Plain) -> None:
    try:
        arguments = {
            "padding_idx": module.padding_idx,
            "max_norm": module.max_norm,
            "scale_grad_by_freq": module.scale_grad_by_freq or None,
            "sparse": module.sparse or None,
        }
        refuse(type(module).__name__, **arguments)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from error
