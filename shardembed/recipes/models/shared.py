"""Rows that all ranks want and only one of them asks for: so that what tables count of ids is what a global batch has of them,
whatever the number of ranks.

Legend: n rows in all, m of this rank, D columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shardembed.comm.comm import Comm
from shardembed.recipes.data.stream import rank_start


def share_of(ids: torch.Tensor) -> slice:
    """The part of `ids`, which all ranks have alike, that this rank asks for."""
    comm = Comm.of()
    first, end = (rank_start(len(ids), rank, comm.world_size) for rank in (comm.rank, comm.rank + 1))
    return slice(first, end)


def shared(mine_mD: torch.Tensor, share: slice, count: int) -> torch.Tensor:
    """All ranks' rows `[n, D]`, float32 where they are of half precision, of which this rank has `share`. Collective, and again in
    the backward, which gives each row the gradients of all ranks.
    """
    if Comm.of().world_size == 1:
        return mine_mD
    wide = mine_mD if mine_mD.dtype == torch.float64 else mine_mD.float()
    joined: Callable[..., torch.Tensor] = _Shared.apply
    return joined(wide, share, count)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine_mD: torch.Tensor, share: slice, count: int) -> torch.Tensor:
        ctx.share = share
        whole = mine_mD.new_zeros(count, mine_mD.shape[1])
        whole[share] = mine_mD
        return Comm.of().all_reduce("share rows that all ranks want", whole)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        whole = Comm.of().all_reduce("add up gradients of shared rows", gradients[0].contiguous().clone())
        return whole[ctx.share], None, None
