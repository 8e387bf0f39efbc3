"""The truth: lookup and every optimizer's update in plain torch, for every dtype, width and device.

Legend: E entries (row, segment) of a request, S segments, U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, RowwiseAdagrad, TableOptimizer

PIECE_ELEMENTS = 1 << 16  # updated at a time on a CPU


@dataclass(frozen=True)
class Gradients:
    """Gradients that wait at the owner: every row of segment s gets `grads_SW[s]`.

    rows_E: slab rows, int64. offsets: where each segment's rows begin, `[S + 1]`, or None when every segment is a single row.
    """

    rows_E: torch.Tensor
    offsets: torch.Tensor | None
    grads_SW: torch.Tensor

    @staticmethod
    def join(parts: list[Gradients]) -> Gradients:
        """All parts as one; what accumulates over micro-batches is exact, since nothing is summed before the merge."""
        if len(parts) == 1:
            return parts[0]
        rows = torch.cat([part.rows_E for part in parts])
        grads = torch.cat([part.grads_SW for part in parts])
        if all(part.offsets is None for part in parts):
            return Gradients(rows, None, grads)
        starts, before = [rows.new_zeros(1)], 0
        for part in parts:
            offsets = part.offsets if part.offsets is not None else torch.arange(part.rows_E.numel() + 1, device=rows.device)
            starts.append(offsets[1:] + before)
            before += part.rows_E.numel()
        return Gradients(rows, torch.cat(starts), grads)

    def without(self, rows: torch.Tensor) -> Gradients:
        """The same without the few `rows`; a segment may become empty."""
        return self.only(~torch.isin(self.rows_E, rows))

    def only(self, kept_E: torch.Tensor) -> Gradients:
        """Those entries alone that are to be kept; a segment may become empty."""
        if self.offsets is None:
            return Gradients(self.rows_E[kept_E], None, self.grads_SW[kept_E])
        before = torch.cat([kept_E.new_zeros(1, dtype=torch.int64), kept_E.cumsum(0)])
        return Gradients(self.rows_E[kept_E], before[self.offsets], self.grads_SW)


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


def update(
    weights: torch.Tensor,
    state: dict[str, torch.Tensor],
    optimizer: TableOptimizer,
    lr: float,
    step: int,
    rows_U: torch.Tensor,
    grads_UW: torch.Tensor,
    mean_square_U: torch.Tensor | None = None,
    narrow: Callable[[torch.Tensor, slice], torch.Tensor] | None = None,
) -> None:
    """Apply one optimizer step to distinct rows, in place.

    Args:
        step: steps taken, this one included (Adam's bias correction).
        mean_square_U: the mean of g^2 over whole rows, where this slab holds only some of their columns.
        narrow: rounds new rows, and is told which of `rows_U` they are, to the table's dtype; to the nearest by default.
    """
    if not rows_U.numel() or (lr == 0 and isinstance(optimizer, FTRL)):  # whose lr divides; a scheduler may start at 0
        return
    # A few rows at a time: what is computed on the way then stays in the cache of a CPU.
    many = max(1, PIECE_ELEMENTS // weights.shape[1]) if weights.device.type == "cpu" else rows_U.numel()
    for piece in (slice(first, first + many) for first in range(0, rows_U.numel(), many)):
        rows, grads = rows_U[piece], grads_UW[piece]
        old = weights.index_select(0, rows).to(grads.dtype)
        held = {name: tensor.index_select(0, rows) for name, tensor in state.items()}
        if isinstance(optimizer, RowwiseAdagrad):
            new = _rowwise_adagrad(old, held, optimizer, lr, grads, None if mean_square_U is None else mean_square_U[piece])
        else:
            new = _FORMULAS[type(optimizer)](old, held, optimizer, lr, step, grads)
        weights.index_copy_(0, rows, new.to(weights.dtype) if narrow is None else narrow(new, piece))
        for name, tensor in held.items():
            state[name].index_copy_(0, rows, tensor)


State = dict[str, torch.Tensor]
Formula = Callable[[torch.Tensor, State, TableOptimizer, float, int, torch.Tensor], torch.Tensor]


def _rowwise_adagrad(
    w: torch.Tensor, state: State, settings: RowwiseAdagrad, lr: float, g: torch.Tensor, mean_square: torch.Tensor | None
) -> torch.Tensor:
    state["sum"] += g.square().mean(1) if mean_square is None else mean_square
    return w - lr * g / (state["sum"].sqrt() + settings.eps).unsqueeze(1)


def _sgd(w: torch.Tensor, state: State, settings: TableOptimizer, lr: float, step: int, g: torch.Tensor) -> torch.Tensor:
    return w - lr * g


def _adagrad(w: torch.Tensor, state: State, settings: TableOptimizer, lr: float, step: int, g: torch.Tensor) -> torch.Tensor:
    assert isinstance(settings, Adagrad)
    state["sum"] += g.square()
    return w - lr * g / (state["sum"].sqrt() + settings.eps)


def _adam(w: torch.Tensor, state: State, settings: TableOptimizer, lr: float, step: int, g: torch.Tensor) -> torch.Tensor:
    assert isinstance(settings, Adam)
    beta1, beta2 = settings.betas
    # Not add_(alpha=...): its vectorised loop fuses the product and the loop over the rest does not, so bits would depend on where
    # a row stands in the slab.
    m = state["exp_avg"].mul_(beta1).add_(g * (1 - beta1))
    v = state["exp_avg_sq"].mul_(beta2).add_(g.square() * (1 - beta2))
    size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    return w - size * m / (v.sqrt() + settings.eps)


def _adamw(w: torch.Tensor, state: State, settings: TableOptimizer, lr: float, step: int, g: torch.Tensor) -> torch.Tensor:
    assert isinstance(settings, AdamW)
    return _adam(w * (1 - lr * settings.weight_decay), state, settings, lr, step, g)


def _ftrl(w: torch.Tensor, state: State, settings: TableOptimizer, lr: float, step: int, g: torch.Tensor) -> torch.Tensor:
    assert isinstance(settings, FTRL)
    n, l1 = state["n"], settings.l1
    start = -w * (settings.beta / lr + settings.l2) - w.sign() * l1  # the z that gives back w while n is 0
    z = torch.where(n == 0, start, state["z"])
    seen = n + g.square()
    z = z + g - (seen.sqrt() - n.sqrt()) / lr * w
    state["z"], state["n"] = z, seen
    scale = (settings.beta + seen.sqrt()) / lr + settings.l2
    shrunk = -(z - z.sign() * l1) / scale
    # scale is 0 only when beta, l2 and every gradient so far are 0: nothing has been learned, nothing moves.
    return torch.where(scale == 0, w, torch.where(z.abs() <= l1, torch.zeros_like(w), shrunk))


_FORMULAS: dict[type[TableOptimizer], Formula] = {SGD: _sgd, Adagrad: _adagrad, Adam: _adam, AdamW: _adamw, FTRL: _ftrl}
