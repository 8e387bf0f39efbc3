"""The kernels on one slab, as `kernels.kernel.Kernel`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData
from shardembed.kernels.triton.lookup import lookup
from shardembed.kernels.triton.merge import merge
from shardembed.kernels.triton.order import Order, direct_of, order
from shardembed.kernels.triton.update import update


@dataclass(frozen=True)
class TritonKernel:
    """Lookup, merge, and merge with the update in one.

    Attributes:
        data: the memory that it works on.
    """

    data: SlabData
    name: ClassVar[str] = "triton"
    fuses: ClassVar[bool] = True
    orders: ClassVar[bool] = True

    def lookup(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
        return lookup(self.data.weights, rows_E, offsets, self.data.compute_dtype)

    def merge(self, waiting: Gradients, order: Order | None) -> tuple[torch.Tensor, torch.Tensor]:
        return merge(waiting, order or self._order(waiting))

    def update(self, waiting: Gradients, order: Order | None, merged: bool, step: Step, factor: float) -> None:
        made = order or self._order(waiting)
        update(self.data, waiting, made, step.lr, step.number, factor, step.mean_square_U)

    def _order(self, waiting: Gradients) -> Order:
        rows, width = self.data.weights.shape
        return order(waiting.rows_E, waiting.offsets, rows, direct_of(width))
