"""The truth: lookup, merge and every optimizer's update in plain torch, for every dtype, width and device.

Legend: E entries (row, segment) of a request, S segments, U distinct rows, W width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from shardembed.kernels.formulas import FORMULAS, Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.grouping import merge
from shardembed.kernels.kernel import Rows, SlabData, SlabFacts, Source, lacks
from shardembed.kernels.rounding import stochastic

PIECE_ELEMENTS = 1 << 16  # updated at a time on a CPU


def lookup(weights: torch.Tensor, rows_E: torch.Tensor, offsets: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The sum of each segment's rows, `[S, W]`; the row itself, in the table's dtype, where every segment is a single row.

    Sums are made in `dtype`.
    """
    if offsets is None:
        return weights.index_select(0, rows_E)
    if weights.dtype == dtype:
        return F.embedding_bag(rows_E, weights, offsets, mode="sum", include_last_offset=True)
    gathered = weights.index_select(0, rows_E).to(dtype)
    return F.embedding_bag(
        torch.arange(rows_E.numel(), device=rows_E.device), gathered, offsets, mode="sum", include_last_offset=True
    )


def is_finite(values: torch.Tensor) -> bool:
    """No value is inf or nan. A sum is read at the speed of memory, and one that overflows is looked at again."""
    if not values.is_floating_point():
        return True
    if values.dtype.itemsize == 1:  # the dtypes of 8 bits cannot be added
        values = values.to(torch.float32)
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())  # host sync on a GPU


def frequencies(rows_E: torch.Tensor, multiplicities_E: torch.Tensor) -> torch.Tensor:
    """How often the row of each entry occurs in all entries together, int64 `[E]`."""
    rows_U, inverse = torch.unique(rows_E, return_inverse=True)
    sums = torch.zeros_like(rows_U).index_add_(0, inverse, multiplicities_E.to(torch.int64))
    return sums[inverse]


def norm_powers(weights: torch.Tensor, rows_U: torch.Tensor, norm_type: float) -> torch.Tensor:
    """What the norms of rows are made of: |w|^norm_type (|w| for the infinity norm), float64 `[U, W]`."""
    sizes = weights.index_select(0, rows_U).to(torch.float64).abs()
    return sizes if norm_type == float("inf") else sizes.pow(norm_type)


def renormalise(weights: torch.Tensor, rows_U: torch.Tensor, sums_U: torch.Tensor, max_norm: float, norm_type: float) -> None:
    """Scale the rows whose norm exceeds `max_norm` to it, in place, as `torch.embedding_renorm_` does (1e-7 is its constant).

    Args:
        sums_U: of `norm_powers` over whole rows; their maximum for the infinity norm.
    """
    norms = sums_U if norm_type == float("inf") else sums_U.pow(1.0 / norm_type)
    large = norms > max_norm
    rows = rows_U[large]  # host sync on a GPU: how many there are
    scale = max_norm / (norms[large] + 1e-7)
    kept = weights.index_select(0, rows)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    weights.index_copy_(0, rows, (kept.to(dtype) * scale.to(dtype).unsqueeze(1)).to(weights.dtype))


def update(data: SlabData, rows_U: torch.Tensor, grads_UW: torch.Tensor, step: Step) -> None:
    """Apply one optimizer step to distinct rows, in place, a few at a time."""
    weights, state, optimizer = data.weights, data.state, data.optimizer
    formula = FORMULAS[type(optimizer)]
    origins = None if data.blocks is None else data.blocks.of_rows(rows_U)
    # A few rows at a time: what is computed on the way then stays in the cache of a CPU.
    many = max(1, PIECE_ELEMENTS // weights.shape[1]) if weights.device.type == "cpu" else max(1, rows_U.numel())
    for piece in (slice(first, first + many) for first in range(0, rows_U.numel(), many)):
        rows, grads = rows_U[piece], grads_UW[piece]
        old = weights.index_select(0, rows).to(grads.dtype)
        held = {name: tensor.index_select(0, rows) for name, tensor in state.items()}
        given = None if step.mean_square_U is None else step.mean_square_U[piece]
        square = grads.square().mean(1) if optimizer.rowwise and given is None else given
        new = formula(old, held, grads, optimizer, replace(step, mean_square_U=square))
        narrow = new.to(weights.dtype) if origins is None else stochastic(new, weights.dtype, origins[piece], step.number)
        weights.index_copy_(0, rows, narrow)
        for name, tensor in held.items():
            state[name].index_copy_(0, rows, tensor)


def cannot(facts: SlabFacts) -> str | None:
    """Why the reference does not serve such a slab: only where nobody has written its optimizer's formula."""
    return lacks(FORMULAS, facts.optimizer)


@dataclass(frozen=True)
class ReferenceKernel:
    """`kernels.kernel.Kernel` in plain torch.

    Attributes:
        data: the memory that it works on.
    """

    data: SlabData
    name: ClassVar[str] = "reference"
    fuses: ClassVar[bool] = False
    orders: ClassVar[bool] = False

    def lookup(self, rows_E: torch.Tensor, offsets: torch.Tensor | None) -> Source:
        if offsets is None:
            return Rows(self.data.weights, rows_E)
        return lookup(self.data.weights, rows_E, offsets, self.data.compute_dtype)

    def merge(self, waiting: Gradients, order: object) -> tuple[torch.Tensor, torch.Tensor]:
        return merge(waiting, self.data.weights.shape[0])

    def update(self, waiting: Gradients, order: object, merged: bool, step: Step, factor: float) -> None:
        assert merged
        if factor != 1.0:
            waiting.grads_SW.mul_(factor)
        update(self.data, waiting.rows_E, waiting.grads_SW, step)
