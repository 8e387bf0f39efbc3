"""Compiled updates for slabs on a CPU: merge and update in pieces that stay in the cache, so that merged gradients are never laid
out in memory as a whole.

Legend: U distinct rows, W width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from shardembed.kernels.grouping import compiled, group_rows, missing
from shardembed.kernels.reference import Gradients
from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, RowwiseAdagrad, TableOptimizer

PIECE_ELEMENTS = 1 << 17  # of merged gradients at a time: 512 KiB of float32


def cannot(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why such a slab is not updated by compiled kernels, or None when it is."""
    if device.type != "cpu":
        return f"its kernels are for the CPU, not for {device.type}"
    if dtype not in (torch.float32, torch.float64):
        return f"its kernels are for float32 and float64, not for {dtype}"
    return missing()


def step(
    weights: torch.Tensor,
    state: dict[str, torch.Tensor],
    optimizer: TableOptimizer,
    lr: float,
    number: int,
    waiting: Gradients,
    factor: float = 1.0,
) -> None:
    """Merge duplicate rows, and apply one optimizer step to their gradients times `factor`, in place."""
    groups = group_rows(waiting, weights.shape[0])
    from_E, count = groups.order_E, groups.numbers_U.numel()
    many = max(1, PIECE_ELEMENTS // weights.shape[1])
    for first in range(0, count, many):
        starts = groups.starts[first : first + many + 1]
        begin, end = int(starts[0]), int(starts[-1])
        grads_UW = F.embedding_bag(from_E[begin:end], waiting.grads_SW, starts - begin, mode="sum", include_last_offset=True)
        update(weights, state, optimizer, lr, number, groups.numbers_U[first : first + many], grads_UW, factor=factor)


def update(
    weights: torch.Tensor,
    state: dict[str, torch.Tensor],
    optimizer: TableOptimizer,
    lr: float,
    number: int,
    rows_U: torch.Tensor,
    grads_UW: torch.Tensor,
    mean_square_U: torch.Tensor | None = None,
    factor: float = 1.0,
) -> None:
    """As `reference.update`, of the gradients times `factor`."""
    if not rows_U.numel() or (lr == 0 and isinstance(optimizer, FTRL)):
        return
    kernels = compiled(weights.device)
    assert kernels is not None
    scalar = weights.numpy().dtype.type
    where = (weights.numpy(), *(state[name].numpy() for name in optimizer.state))
    what = (rows_U.numpy(), grads_UW.contiguous().numpy(), scalar(factor))
    call, numbers = _call(kernels.updating, optimizer, lr, number)
    if isinstance(optimizer, RowwiseAdagrad):
        squares = torch.empty(0, dtype=weights.dtype) if mean_square_U is None else mean_square_U
        what += (squares.numpy(),)
    call(*where, *what, *(tuple(map(scalar, part)) if isinstance(part, tuple) else scalar(part) for part in numbers))


def square_sums(grads_UW: torch.Tensor) -> torch.Tensor:
    """The sum of g^2 of each row, float64 `[U]`."""
    kernels = compiled(grads_UW.device)
    if kernels is None or grads_UW.dtype not in (torch.float32, torch.float64):
        return grads_UW.to(torch.float64).square().sum(1)
    return torch.from_numpy(kernels.updating.square_sums(grads_UW.contiguous().numpy()))


def _call(kernels: Any, optimizer: TableOptimizer, lr: float, number: int) -> tuple[Any, tuple[Any, ...]]:
    """The kernel of an optimizer, and the numbers that it takes, computed in float64 as the reference's are."""
    if isinstance(optimizer, SGD):
        return kernels.sgd, (lr,)
    if isinstance(optimizer, RowwiseAdagrad):
        return kernels.rowwise_adagrad, (lr, optimizer.eps)
    if isinstance(optimizer, Adagrad):
        return kernels.adagrad, (lr, optimizer.eps)
    if isinstance(optimizer, FTRL):
        return kernels.ftrl, (lr, optimizer.beta, optimizer.l1, optimizer.l2, optimizer.beta / lr + optimizer.l2)
    assert isinstance(optimizer, Adam)
    beta1, beta2 = optimizer.betas
    size = lr * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
    kept = 1 - lr * optimizer.weight_decay if isinstance(optimizer, AdamW) else 1.0
    return kernels.adam, (size, kept, optimizer.eps, (beta1, beta2), (1 - beta1, 1 - beta2))
