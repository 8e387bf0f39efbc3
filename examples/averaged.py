"""For programs whose loop calls the model itself, so that DistributedDataParallel has no forward to prepare its all-reduce in."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import shardembed as se


def average_before_steps(optimizer: torch.optim.Optimizer, model: nn.Module, *, total: bool = False) -> None:
    """Have every step of `optimizer` begin with the mean, or the total, of the ranks' gradients of the dense part of `model`.

    Every rank must have a gradient of the same parameters. Shards are left alone: they have the gradients of all ranks already.
    """
    shards = {id(shard) for shard in se.ignored(model)}
    dense = [parameter for parameter in model.parameters() if id(parameter) not in shards]

    def reduce(*_: Any) -> None:
        grads = [parameter.grad for parameter in dense if parameter.grad is not None]
        if not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= 1 if total else se.world_size()
        for grad, sums in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(sums.view_as(grad))

    if se.world_size() > 1:
        optimizer.register_step_pre_hook(reduce)
