"""Compiled updates for slabs on a CPU: one call sorts the rows, sums the gradients of each and updates it, so that merged gradients
are never laid out in memory.

This file imports no Numba, which may be absent.

Legend: U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.grouping import compiled, missing, segments_of, waiting_sorts
from shardembed.kernels.kernel import SlabFacts, lacks
from shardembed.kernels.reference import ReferenceKernel
from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, Lion, RowwiseAdagrad, RowwiseAdam, TableOptimizer

DTYPES = (torch.float32, torch.float64)
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Compiled:
    """The update of an optimizer.

    Attributes:
        function: its name in `kernels.numba.updating`.
        numbers: what its formula reads of the settings, the learning rate and the number of steps; in float64, as the reference
            computes them.
    """

    function: str
    numbers: Callable[[Any, float, int], Numbers]


def _adam(settings: Adam, lr: float, number: int) -> Numbers:
    beta1, beta2 = settings.betas
    size = lr * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
    kept = 1 - lr * settings.weight_decay if isinstance(settings, AdamW) else 1.0
    return size, kept, settings.eps, beta1, beta2, 1 - beta1, 1 - beta2


def _rowwise_adam(settings: RowwiseAdam, lr: float, number: int) -> Numbers:
    beta1, beta2 = settings.betas
    root = (1 - beta2**number) ** 0.5
    kept = 1 - lr * settings.weight_decay
    return lr * root / (1 - beta1**number), kept, settings.eps * root, beta1, beta2, 1 - beta1, 1 - beta2


def _lion(settings: Lion, lr: float, number: int) -> Numbers:
    beta1, beta2 = settings.betas
    return lr, 1 - lr * settings.weight_decay, beta1, beta2, 1 - beta1, 1 - beta2


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
    """The reference with compiled updates. Its lookups and merges are torch's, which are as fast as memory."""

    name: ClassVar[str] = "numba"
    fuses: ClassVar[bool] = True

    def update(self, waiting: Gradients, order: object, merged: bool, step: Step, factor: float) -> None:
        data = self.data
        assert waiting_sorts(waiting, data.weights.shape[0]), "rows and places that no word holds, and so no memory"
        assert merged or step.mean_square_U is None, "a statistic of merged rows, for gradients that are not merged"
        if not waiting.rows_E.numel():
            return
        kernels, formula, scalar = compiled(data.weights.device), FORMULAS[type(data.optimizer)], data.weights.numpy().dtype.type
        assert kernels is not None
        given = waiting.rows_E.contiguous().numpy(), segments_of(waiting.offsets), waiting.grads_SW.contiguous().numpy()
        square_U = data.weights.new_empty(0) if step.mean_square_U is None else step.mean_square_U
        numbers = tuple(map(scalar, formula.numbers(data.optimizer, step.lr, step.number)))
        getattr(kernels.updating, formula.function)(self._slab(), given, square_U.contiguous().numpy(), scalar(factor), numbers)

    def _slab(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Flat arrays: the weights and what has as many numbers as they; what has one a row."""
        declared, state = self.data.optimizer.state, self.data.state
        by_column = self.data.weights, *(state[name] for name, shape in declared.items() if shape == "element")
        by_row = (state[name] for name, shape in declared.items() if shape == "row")
        return tuple(array.view(-1).numpy() for array in by_column), tuple(array.numpy() for array in by_row)


def square_sums(grads_UW: torch.Tensor) -> torch.Tensor:
    """The sum of g^2 of each row, float64 `[U]`."""
    kernels = compiled(grads_UW.device)
    if kernels is None or grads_UW.dtype not in DTYPES:
        return grads_UW.to(torch.float64).square().sum(1)
    return torch.from_numpy(kernels.updating.square_sums(grads_UW.contiguous().numpy()))
