"""Tables without an optimizer of ours: this rank's shards as Parameters, for the user's own torch optimizer.

A Parameter shares its memory with the slab, so what an optimizer does to it in place is what the next lookup reads. Its gradient
is put there by each backward, merged over duplicates and over all ranks: dense, or sparse COO.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardembed.comm import Comm
from shardembed.layout import Shard
from shardembed.optim import External
from shardembed.slab import LocalShard, Slab
from shardembed.step import reduce_copies


class ExposedShard(nn.Parameter):
    """One shard's weights as a Parameter. `shard` says which part of which table; `copied`, whether every rank has it."""

    shard: LocalShard
    copied: bool

    @staticmethod
    def of(shard: LocalShard, copied: bool) -> ExposedShard:
        exposed = torch.Tensor._make_subclass(ExposedShard, shard.weights, True)
        exposed.shard, exposed.copied = shard, copied
        return exposed


class Exposed:
    """The Parameters of one slab, in the order of its shards."""

    def __init__(self, slab: Slab) -> None:
        assert isinstance(slab.spec.optimizer, External)
        self.slab, self.sparse = slab, slab.spec.optimizer.sparse
        self.parameters = [ExposedShard.of(shard, slab.spec.copied) for shard in slab.shards()]
        if slab.spec.policy.frozen:
            for parameter in self.parameters:
                parameter.requires_grad_(False)

    def parameters_of(self, table: str) -> list[ExposedShard]:
        """The shards of one table; an empty one where this rank holds none."""
        lanes = [lane for lane in self.slab.spec.lanes if self.slab.table_of(lane) == table]
        mine = [parameter for parameter in self.parameters if parameter.shard.table == table]
        if lanes and not mine:
            shard = Shard(range(0), lanes[0].columns, ())
            mine = [ExposedShard.of(LocalShard(table, shard, 0, self.slab.weights[:0], {}), copied=False)]
        return mine

    def deliver(self) -> None:
        """Add the waiting gradients to the Parameters' `.grad`; they no longer wait then."""
        rows_U, grads_UW = self.slab.merged()
        self.slab.drop()
        for parameter in self.parameters:
            first = parameter.shard.first_key
            edges = torch.tensor([first, first + parameter.shape[0]], device=rows_U.device)
            start, stop = torch.searchsorted(rows_U, edges).tolist()
            if parameter.requires_grad:
                self._add(parameter, rows_U[start:stop] - first, grads_UW[start:stop].to(parameter.dtype))

    def _add(self, parameter: ExposedShard, rows_U: torch.Tensor, grads_UW: torch.Tensor) -> None:
        if self.sparse:
            grad = torch.sparse_coo_tensor(
                rows_U.unsqueeze(0), grads_UW, parameter.shape, is_coalesced=True, check_invariants=False
            )
            parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            return
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.index_add_(0, rows_U, grads_UW)


def expose(slabs: Sequence[Slab]) -> list[Exposed]:
    """The slabs whose tables have no optimizer of ours."""
    return [Exposed(slab) for slab in slabs if isinstance(slab.spec.optimizer, External)]


def deliver(exposed: Sequence[Exposed], comm: Comm, collection: int, reduced: bool) -> None:
    """Hand this backward's gradients to the Parameters. Collective where a table is copied to every rank, unless copies have been
    `reduced`.
    """
    if not reduced:
        reduce_copies([one.slab for one in exposed], comm, collection)
    for one in exposed:
        if not one.slab.spec.policy.frozen:
            one.deliver()


def ignored(model: nn.Module) -> set[nn.Parameter]:
    """The Parameters of `model` that are shards of tables (`optimizer=None`): each rank has its own, so nothing may average or
    broadcast them.

    Pass the result to `fully_shard(model, ignored_params=...)`. DistributedDataParallel is told by this call itself: make it before
    `DistributedDataParallel(model)`, with the very module that is wrapped.
    """
    shards = {name: parameter for name, parameter in model.named_parameters() if isinstance(parameter, ExposedShard)}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(shards))
    return set(shards.values())
