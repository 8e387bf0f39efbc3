"""Tables without an optimizer of ours: this rank's shards as Parameters, for the user's own torch optimizer.

A Parameter shares its memory with the slab, so what an optimizer does to it in place is what the next lookup reads. Its gradient
is put there by each backward, merged over duplicates and over all ranks: dense, or sparse COO. What else takes Parameters and their
gradients (wrappers, clipping, GradScaler) is told of them in `wrappers` and `guarded`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from shardembed.comm import Comm
from shardembed.guarded import ShardGradient
from shardembed.layout import Shard
from shardembed.optim import External
from shardembed.slab import LocalShard, Slab
from shardembed.step import reduce_copies


class ExposedShard(nn.Parameter):
    """One shard's weights as a Parameter. `shard` says which part of which table; `copied`, whether every rank has it; `whole`,
    whether it is the whole table, or the table lies whole on another rank; `comm`, who has the rest.
    """

    # For DistributedDataParallel's mixed precision and torch.compile, and for FullyShardedDataParallel: not theirs.
    _ddp_ignored = True
    _fsdp_flattened = True

    shard: LocalShard
    copied: bool
    whole: bool
    comm: Comm

    @staticmethod
    def of(shard: LocalShard, copied: bool, whole: bool, comm: Comm) -> ExposedShard:
        exposed = torch.Tensor._make_subclass(ExposedShard, shard.weights, True)
        exposed.shard, exposed.copied, exposed.whole, exposed.comm = shard, copied, whole, comm
        return exposed

    @property
    def cut(self) -> bool:
        """Ranks have different parts of the table."""
        return self.comm.world_size > 1 and not self.copied


class Exposed:
    """The Parameters of one slab, in the order of its shards. A rank that holds nothing of a table has one without rows, so that
    optimizers can be built, and find gradients, on every rank.
    """

    def __init__(self, slab: Slab, comm: Comm) -> None:
        assert isinstance(slab.spec.optimizer, External)
        self.slab, self.sparse, self._comm = slab, slab.spec.optimizer.sparse, comm
        self.parameters = [self._parameter(shard) for shard in [*slab.shards(), *self._missing()]]
        if slab.spec.policy.frozen:
            for parameter in self.parameters:
                parameter.requires_grad_(False)

    def _parameter(self, shard: LocalShard) -> ExposedShard:
        return ExposedShard.of(shard, self.slab.spec.copied, self.slab.is_whole(shard.table), self._comm)

    def _missing(self) -> Iterator[LocalShard]:
        """Nothing of each table that this rank holds nothing of."""
        seen = {shard.table for shard in self.slab.shards()}
        for lane in self.slab.spec.lanes:
            table = self.slab.table_of(lane)
            if table not in seen:
                seen.add(table)
                yield LocalShard(table, Shard(range(0), lane.columns, ()), 0, self.slab.weights[:0], {})

    def parameters_of(self, table: str) -> list[ExposedShard]:
        """The shards of one table."""
        return [parameter for parameter in self.parameters if parameter.shard.table == table]

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
            grad = grad if parameter.grad is None else parameter.grad + grad
        else:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            grad.index_add_(0, rows_U, grads_UW)
        parameter.grad = ShardGradient.of(grad, parameter.shard.table, parameter.comm) if parameter.cut else grad


def expose(slabs: Sequence[Slab], comm: Comm) -> list[Exposed]:
    """The slabs whose tables have no optimizer of ours."""
    return [Exposed(slab, comm) for slab in slabs if isinstance(slab.spec.optimizer, External)]


def deliver(exposed: Sequence[Exposed], comm: Comm, collection: int, reduced: bool) -> None:
    """Hand this backward's gradients to the Parameters. Collective where a table is copied to every rank, unless copies have been
    `reduced`.
    """
    if not reduced:
        reduce_copies([one.slab for one in exposed], comm, collection)
    for one in exposed:
        if not one.slab.spec.policy.frozen:
            one.deliver()
