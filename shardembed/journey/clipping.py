"""Clipping by the norm of all gradients there are: of tables, of their shards, of dense parameters, of DTensors.

A rank adds up its share, a power of the norm, in float64; shares are added (or the largest is taken) over those who hold the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from shardembed.errors import ConfigError, NonFiniteGradientError, StepError, UnsupportedError
from shardembed.journey.journey import Journey
from shardembed.journey.waiting import comms_of, journeys
from shardembed.store.own_parameters import ShardParameter
from shardembed.store.wrappers import is_distributed

if TYPE_CHECKING:  # importing it takes most of a second, and a model that has any has done so
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class _Norm:
    """The p-norm of numbers that lie in several places, by shares: sums of powers, or the largest magnitude."""

    p: float

    @property
    def largest(self) -> bool:
        return math.isinf(self.p)

    def share(self, values: torch.Tensor) -> torch.Tensor:
        wide = values.detach().to(torch.float64)
        if self.largest:
            return wide.abs().amax() if wide.numel() else wide.new_zeros(())
        return (wide.square() if self.p == 2 else wide.abs().pow(self.p)).sum()

    def join(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.maximum(one, other) if self.largest else one + other

    def scaled(self, share: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """The share of numbers that are multiplied with `factor`."""
        return share * (factor.abs() if self.largest else factor.abs().pow(self.p))

    def packed(self, share: torch.Tensor) -> torch.Tensor:
        """What is to be joined over ranks. A nan may get lost where the largest is taken, so it goes beside."""
        return torch.stack([share.nan_to_num(0.0, math.inf), share.isnan().double()]) if self.largest else share.view(1)

    def unpacked(self, joined: torch.Tensor) -> torch.Tensor:
        return torch.where(joined[1] > 0, math.nan, joined[0]) if self.largest else joined[0]

    def root(self, share: torch.Tensor) -> torch.Tensor:
        return share if self.largest else share.sqrt() if self.p == 2 else share.pow(1.0 / self.p)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, norm_type: float = 2.0, *, error_if_nonfinite: bool = False) -> torch.Tensor:
    """Scale all gradients of `model` so that their common norm is at most `max_norm`: dense parameters and sharded tables.

    As `torch.nn.utils.clip_grad_norm_` over the unsharded model: duplicates of a row are summed first, every row and every
    dense parameter counts once, and all ranks scale by the same number. Call it after the last backward of a step. Collective:
    one scalar all-reduce, plus the one that copied tables make once a step anyway, and one for all that `fully_shard` has cut
    alike. Other dense gradients must be the same on all ranks, as DDP leaves them.

    Args:
        max_norm: inf only measures.
        norm_type: the p of the p-norm, above 0; inf for the largest magnitude.

    Returns:
        The norm before clipping, a scalar tensor in float64.

    Raises:
        ConfigError: there is no norm of this type here.
        NonFiniteGradientError: on all ranks, with `error_if_nonfinite`, when the norm is inf or nan.
        StepError: tables are updated in the backward already.
    """
    if not norm_type > 0:
        raise ConfigError(f"norm_type must be above 0, or inf, not {norm_type}")
    found, norm_of = journeys(model), _Norm(float(norm_type))
    if any(journey.settings.update == "backward" for journey in found):
        raise StepError("update='backward' has applied the tables' gradients already; clipping needs update='step'")
    parameters = [p for p in model.parameters() if p.grad is not None]
    dense = [p.grad for p in parameters if not isinstance(p, ShardParameter) and p.grad is not None]
    shards = [p for p in parameters if isinstance(p, ShardParameter)]
    device = found[0].device if found else (dense[0].device if dense else torch.device("cpu"))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for comm in comms_of(found):
        mine = torch.zeros((), dtype=torch.float64, device=device)
        for journey in (journey for journey in found if journey.comm is comm):
            mine = norm_of.join(mine, _waiting(journey, norm_of))
            mine = norm_of.join(mine, _of_shards(journey, shards, norm_of))
        joined = comm.all_reduce("clip_grad_norm_: sum norms", norm_of.packed(mine), maximum=norm_of.largest)
        total = norm_of.join(total, norm_of.unpacked(joined))
    for share in _dense(dense, norm_of):
        total = norm_of.join(total, share.to(device))
    norm = norm_of.root(total)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise NonFiniteGradientError(f"the gradient norm is {float(norm)}; it cannot be clipped")
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    for grad in [*dense, *(p.grad for p in shards if p.grad is not None)]:
        mine = grad.to_local() if is_distributed(grad) else grad
        mine.mul_(factor.to(mine.device, mine.dtype))
    for journey in found:
        if journey.pending.waiting:
            journey.pending.scaled(factor)
    return norm


def _dense(grads: Sequence[torch.Tensor], norm: _Norm) -> list[torch.Tensor]:
    """The shares of dense gradients; those of DTensors that are placed alike go together, in one collective."""
    shares = [norm.share(grad) for grad in grads if not is_distributed(grad)]
    groups: dict[object, list[DTensor]] = {}
    for grad in grads:
        if is_distributed(grad):
            groups.setdefault((grad.device_mesh, grad.placements), []).append(grad)
    return shares + [_distributed(alike, norm) for alike in groups.values()]


def _distributed(grads: Sequence[DTensor], norm: _Norm) -> torch.Tensor:
    """The share of all ranks' parts together; what several ranks have alike counts once. Collective."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    first = grads[0]
    if any(placement.is_partial() for placement in first.placements):
        raise UnsupportedError(
            f"a gradient is a DTensor placed as {first.placements}: its parts are still to be summed; clip after they have been"
        )
    mine = torch.zeros((), dtype=torch.float64, device=first.to_local().device)
    for grad in grads:
        mine = norm.join(mine, norm.share(grad.to_local()))
    how = Partial("max" if norm.largest else "sum")
    placements = [Replicate() if placement.is_replicate() else how for placement in first.placements]
    return norm.unpacked(DTensor.from_local(norm.packed(mine), first.device_mesh, placements, run_check=False).full_tensor())


def _of_shards(journey: Journey, shards: Sequence[ShardParameter], norm: _Norm) -> torch.Tensor:
    """As `_waiting`, of the gradients that Parameters of this collection (`optimizer=None`) have."""
    here = {id(parameter) for own in journey.own_parameters for parameter in own.parameters}
    total = torch.zeros((), dtype=torch.float64, device=journey.device)
    for shard in shards:
        if id(shard) in here and shard.grad is not None and (not shard.copied or journey.comm.rank == 0):
            grad = shard.grad.coalesce().values() if shard.grad.is_sparse else shard.grad
            total = norm.join(total, norm.share(grad))
    return total


def _waiting(journey: Journey, norm: _Norm) -> torch.Tensor:
    """This rank's share of the norm of a collection's waiting gradients; copied rows count on rank 0 alone."""
    journey.reduce()
    total = torch.zeros((), dtype=torch.float64, device=journey.device)
    for slab in journey.slabs:
        if not slab.spec.copied or journey.comm.rank == 0:
            total = norm.join(total, norm.share(slab.merged()[1]))
    factor = journey.pending.factor
    return total if factor is None else norm.scaled(total, factor.to(torch.float64).squeeze())
