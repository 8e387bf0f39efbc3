"""One slab's view of the kernels: what does not change between calls, kept."""

from __future__ import annotations

import torch

from shardembed.kernels.reference import Gradients
from shardembed.kernels.triton.lookup import lookup
from shardembed.kernels.triton.merge import merge
from shardembed.kernels.triton.noise import Blocks, Origin
from shardembed.kernels.triton.order import Order, order
from shardembed.kernels.triton.update import update
from shardembed.optim import TableOptimizer


class Table:
    """The kernels on a slab's weights and optimizer state.

    origins: where its rows come from, if they are rounded at random.
    """

    def __init__(
        self, weights: torch.Tensor, state: dict[str, torch.Tensor], optimizer: TableOptimizer, origins: list[Origin] | None
    ) -> None:
        self._weights, self._state, self._optimizer = weights, state, optimizer
        self._blocks = Blocks.of(origins, weights.device) if origins else None

    def lookup(self, rows_E: torch.Tensor, offsets: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """As `reference.lookup`."""
        return lookup(self._weights, rows_E, offsets, dtype)

    def order(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> Order:
        """What merge and update need to know of the rows; may be made in the forward."""
        return order(rows_E, offsets, self._weights.shape[0])

    def merge(self, waiting: Gradients, made: Order | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As `reference.merge`. made: the order of these entries, if it is there already."""
        return merge(waiting, made or self.order(waiting.rows_E, waiting.offsets))

    def update(
        self, waiting: Gradients, made: Order | None, lr: float, step: int, factor: float, mean_square_U: torch.Tensor | None
    ) -> None:
        """Merge duplicate rows, and apply one optimizer step to their gradients times `factor`, in place."""
        made = made or self.order(waiting.rows_E, waiting.offsets)
        slab = (self._weights, self._state, self._optimizer)
        update(*slab, lr, step, waiting, made, factor, mean_square_U, self._blocks)
