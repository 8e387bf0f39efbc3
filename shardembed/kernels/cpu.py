"""Compiled updates for slabs on a CPU: merge and update in pieces that stay in the cache, so that merged gradients are never laid
out in memory as a whole.

This file imports no Numba, which may be absent.

Legend: U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.grouping import compiled, group_rows, missing
from shardembed.kernels.kernel import SlabData, SlabFacts, lacks
from shardembed.kernels.reference import ReferenceKernel
from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, Lion, RowwiseAdagrad, RowwiseAdam, TableOptimizer

PIECE_ELEMENTS = 1 << 17  # of merged gradients at a time: 512 KiB of float32
DTYPES = (torch.float32, torch.float64)
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], None]
Numbers = tuple[float | tuple[float, ...], ...]


@dataclass(frozen=True)
class Compiled:
    """The update of an optimizer.

    Attributes:
        function: its name in `kernels.numba.updating`.
        numbers: what the function takes last, from the settings, the learning rate and the number of steps; in float64, as the
            reference computes them.
    """

    function: str
    numbers: Callable[[Any, float, int], Numbers]


def _adam(settings: Adam, lr: float, number: int) -> Numbers:
    beta1, beta2 = settings.betas
    size = lr * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
    kept = 1 - lr * settings.weight_decay if isinstance(settings, AdamW) else 1.0
    return size, kept, settings.eps, (beta1, beta2), (1 - beta1, 1 - beta2)


def _rowwise_adam(settings: RowwiseAdam, lr: float, number: int) -> Numbers:
    beta1, beta2 = settings.betas
    root = (1 - beta2**number) ** 0.5
    kept = 1 - lr * settings.weight_decay
    return lr * root / (1 - beta1**number), kept, settings.eps * root, (beta1, beta2), (1 - beta1, 1 - beta2)


def _lion(settings: Lion, lr: float, number: int) -> Numbers:
    beta1, beta2 = settings.betas
    return lr, 1 - lr * settings.weight_decay, (beta1, beta2), (1 - beta1, 1 - beta2)


def _ftrl(settings: FTRL, lr: float, number: int) -> Numbers:
    return lr, settings.beta, settings.l1, settings.l2, settings.beta / lr + settings.l2


FORMULAS: dict[type[TableOptimizer], Compiled] = {
    SGD: Compiled("sgd", lambda settings, lr, number: (lr,)),
    Adagrad: Compiled("adagrad", lambda settings, lr, number: (lr, settings.eps)),
    RowwiseAdagrad: Compiled("rowwise_adagrad", lambda settings, lr, number: (lr, settings.eps)),
    Adam: Compiled("adam", _adam),
    AdamW: Compiled("adam", _adam),
    RowwiseAdam: Compiled("rowwise_adam", _rowwise_adam),
    FTRL: Compiled("ftrl", _ftrl),
    Lion: Compiled("lion", _lion),
}


def lacking(optimizer: TableOptimizer, dtype: torch.dtype) -> str | None:
    """Why there is no compiled update for such tables, on whatever machine; None where there is one."""
    if dtype not in DTYPES:
        return f"its kernels are for float32 and float64, not for {dtype}"
    return lacks(FORMULAS, optimizer)


def cannot(facts: SlabFacts) -> str | None:
    """Why such a slab is not updated by compiled kernels, or None when it is."""
    if facts.device.type != "cpu":
        return f"its kernels are for the CPU, not for {facts.device.type}"
    return lacking(facts.optimizer, facts.dtype) or missing()


@dataclass(frozen=True)
class NumbaKernel(ReferenceKernel):
    """The reference with compiled updates. Its lookups and sums are torch's, which are as fast as memory."""

    name: ClassVar[str] = "numba"
    fuses: ClassVar[bool] = True

    def update(self, waiting: Gradients, order: object, merged: bool, step: Step, factor: float) -> None:
        call = _call(self.data, step, factor)
        if merged:
            call(waiting.rows_E, waiting.grads_SW, step.mean_square_U)
            return
        assert step.mean_square_U is None, "a statistic of merged rows, for gradients that are not merged"
        groups = group_rows(waiting, self.data.weights.shape[0])
        from_E, count = groups.order_E, groups.numbers_U.numel()
        many = max(1, PIECE_ELEMENTS // self.data.weights.shape[1])
        for first in range(0, count, many):
            starts = groups.starts[first : first + many + 1]
            begin, end = int(starts[0]), int(starts[-1])
            grads_UW = F.embedding_bag(from_E[begin:end], waiting.grads_SW, starts - begin, mode="sum", include_last_offset=True)
            call(groups.numbers_U[first : first + many], grads_UW, None)


def _call(data: SlabData, step: Step, factor: float) -> Call:
    """The update of some distinct rows: (rows `[U]`, gradients `[U, W]`, mean squares of whole rows `[U]` or None)."""
    kernels = compiled(data.weights.device)
    assert kernels is not None
    formula = FORMULAS[type(data.optimizer)]
    function = getattr(kernels.updating, formula.function)
    where = (data.weights.numpy(), *(data.state[name].numpy() for name in data.optimizer.state))
    scalar = where[0].dtype.type
    numbers = [
        tuple(map(scalar, part)) if isinstance(part, tuple) else scalar(part)
        for part in formula.numbers(data.optimizer, step.lr, step.number)
    ]
    none = torch.empty(0, dtype=data.weights.dtype)

    def call(rows_U: torch.Tensor, grads_UW: torch.Tensor, mean_square_U: torch.Tensor | None) -> None:
        if not rows_U.numel():
            return
        square = ((none if mean_square_U is None else mean_square_U).numpy(),) if data.optimizer.rowwise else ()
        function(*where, rows_U.numpy(), grads_UW.contiguous().numpy(), scalar(factor), *square, *numbers)

    return call


def square_sums(grads_UW: torch.Tensor) -> torch.Tensor:
    """The sum of g^2 of each row, float64 `[U]`."""
    kernels = compiled(grads_UW.device)
    if kernels is None or grads_UW.dtype not in DTYPES:
        return grads_UW.to(torch.float64).square().sum(1)
    return torch.from_numpy(kernels.updating.square_sums(grads_UW.contiguous().numpy()))
