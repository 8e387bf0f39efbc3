"""What torch's own tools that take a model's Parameters have to know of shards (`optimizer=None`).

Each rank has other rows in its shards. A wrapper that broadcasts Parameters would overwrite them with rank 0's, one that averages
gradients would add up those of different rows, and an optimizer that looks at whole matrices would see a part of one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardembed.errors import CheckpointError, ConfigError, UnsupportedError
from shardembed.store.own_parameters import ShardParameter

if TYPE_CHECKING:  # importing it takes most of a second, and a model that has any has done so
    from torch.distributed.tensor import DTensor

WHOLE_MATRICES = (torch.optim.Adafactor, torch.optim.Muon)
ONE_DIRECTION = (torch.optim.LBFGS,)
CALLERS = 10  # as many as stand between torch's checkpoints and an optimizer's hooks, and some


def ignored(model: nn.Module) -> set[nn.Parameter]:
    """The Parameters of `model` that are shards of tables (`optimizer=None`): each rank has its own, so nothing may average or
    broadcast them.

    Pass the result to `fully_shard(model, ignored_params=...)`. DistributedDataParallel and FullyShardedDataParallel leave shards
    alone without being told; a loop that calls `broadcast` or `all_reduce` for each Parameter has to leave these out.
    """
    return set(_shards(model).values())


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """The tensor is a DTensor, as `fully_shard` makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@cache
def watch() -> None:
    """From now on, in this process, have wrappers leave shards alone, and refuse optimizers that cannot step them."""
    register_module_module_registration_hook(_leave_shards_alone)
    register_optimizer_step_pre_hook(_check_optimizer)


def _shards(model: nn.Module) -> dict[str, ShardParameter]:
    """By name. A table that several modules share has several."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if isinstance(parameter, ShardParameter)}


def _leave_shards_alone(wrapper: nn.Module, name: str, model: nn.Module | None) -> None:
    """Take shards out of what DistributedDataParallel is about to broadcast and to average. Torch calls this in its constructor,
    where it knows what to ignore and has sent nothing.

    This way no module has to be told beforehand, and it does not matter which one is wrapped.
    """
    if not isinstance(wrapper, DistributedDataParallel) or name != "module" or model is None:
        return
    if not (shards := _shards(model)):
        return
    # In one place torch has a dot before the names of the wrapped module's own parameters.
    wrapper.parameters_to_ignore |= {*shards, *(f".{own}" for own in shards)}
    wrapper._module_parameters = [one for one in wrapper._module_parameters if not isinstance(one, ShardParameter)]
    if not any(one.requires_grad for one in wrapper._module_parameters):
        tables = sorted({shard.shard.table for shard in shards.values()})
        raise ConfigError(
            f"DistributedDataParallel has nothing to do here: beside the shards of {', '.join(map(repr, tables))} no parameter "
            "requires a gradient. Their gradients are merged over the ranks already; use the model as it is"
        )


def _check_optimizer(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raises UnsupportedError, before the first step, where an optimizer's rule needs more than a shard. Where it does not, its
    state is that of shards from now on.
    """
    zero = getattr(sys.modules.get("torch.distributed.optim"), "ZeroRedundancyOptimizer", ())  # slow to import
    name = type(optimizer).__name__
    if isinstance(optimizer, zero):
        _refuse(_cut(optimizer), f"{name} gives each parameter to one rank and broadcasts it from there")
    elif isinstance(optimizer, ONE_DIRECTION):
        _refuse(_cut(optimizer), f"{name} takes one direction for all parameters, from products over all of them")
    elif isinstance(optimizer, WHOLE_MATRICES):
        _refuse((shard for shard in _cut(optimizer) if not shard.undivided), f"{name} looks at a matrix as a whole")
        for shard in _cut(optimizer):
            if not shard.numel():  # it would divide by the size
                shard.grad = None
    hooks = (optimizer._optimizer_state_dict_post_hooks, optimizer._optimizer_load_state_dict_pre_hooks)
    if all(_refuse_torch_checkpoint in hooks_of.values() for hooks_of in hooks):
        return
    if not any(ShardParameter in map(type, group["params"]) for group in optimizer.param_groups):  # fast: it may have thousands
        return
    if next(_cut(optimizer), None) is not None:
        optimizer.register_state_dict_post_hook(_refuse_torch_checkpoint)
        optimizer.register_load_state_dict_pre_hook(_refuse_torch_checkpoint)


def _refuse_torch_checkpoint(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    refuse_torch_checkpoint(type(optimizer).__name__)


def refuse_torch_checkpoint(name: str) -> None:
    """Raises CheckpointError where `get_state_dict` and its kind, of torch.distributed.checkpoint, ask for the state of an
    optimizer that has to do with tables: they know it by the model's Parameters, and would take a rank's part for all.

    Whoever else asks for it keeps it for this rank, and may have it; so the callers are looked at.
    """
    frame = sys._getframe(1)
    for _ in range(CALLERS):
        if frame is None:
            return
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            raise CheckpointError(
                f"torch.distributed.checkpoint asks for the state of {name}, of which every rank has another part, by the names of "
                "whole parameters. Use se.save_checkpoint(folder, model, optimizer=...) and se.load_checkpoint, on all ranks; "
                "get_model_state_dict serves for the weights alone"
            )
        frame = frame.f_back


def _cut(optimizer: torch.optim.Optimizer) -> Iterator[ShardParameter]:
    """The shards it holds of which other ranks have other parts."""
    for group in optimizer.param_groups:
        for one in group["params"]:
            if isinstance(one, ShardParameter) and one.cut:
                yield one


def _refuse(shards: Iterator[ShardParameter], why: str) -> None:
    tables = sorted({shard.shard.table for shard in shards})
    if tables:
        raise UnsupportedError(
            f"{why}, but of table(s) {', '.join(map(repr, tables))} every rank has other rows or columns: it would train another "
            "model than on whole tables. Use an optimizer that works element by element (SGD, Adagrad, Adam, AdamW, SparseAdam), "
            "or one of se.optim for the tables"
        )
