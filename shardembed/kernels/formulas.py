"""The truth of every optimizer's step, in plain torch; the docstrings in `optim` say the same in mathematics.

Legend: U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, Lion, RowwiseAdagrad, RowwiseAdam, TableOptimizer

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """What a formula knows of a step.

    Attributes:
        lr: the learning rate now, which a scheduler may have changed; above 0 where the optimizer says that it divides.
        number: steps taken, this one included.
        mean_square_U: the mean of g^2 over the whole of each row, `[U]`; only for optimizers that are `rowwise`.
    """

    lr: float
    number: int
    mean_square_U: torch.Tensor | None = None

    @property
    def mean_square(self) -> torch.Tensor:
        assert self.mean_square_U is not None, "the optimizer does not say that it is rowwise"
        return self.mean_square_U


# (weights [U, W], state, gradients [U, W], settings, step) -> new weights [U, W]. All are copies in the compute dtype; new state is
# written into the mapping, or into its tensors.
Formula = Callable[[torch.Tensor, State, torch.Tensor, Any, Step], torch.Tensor]


def _sgd(w: torch.Tensor, state: State, g: torch.Tensor, settings: SGD, step: Step) -> torch.Tensor:
    return w - step.lr * g


def _adagrad(w: torch.Tensor, state: State, g: torch.Tensor, settings: Adagrad, step: Step) -> torch.Tensor:
    state["sum"] += g.square()
    return w - step.lr * g / (state["sum"].sqrt() + settings.eps)


def _rowwise_adagrad(w: torch.Tensor, state: State, g: torch.Tensor, settings: RowwiseAdagrad, step: Step) -> torch.Tensor:
    state["sum"] += step.mean_square
    return w - step.lr * g / (state["sum"].sqrt() + settings.eps).unsqueeze(1)


def _adam(w: torch.Tensor, state: State, g: torch.Tensor, settings: Adam, step: Step) -> torch.Tensor:
    beta1, beta2 = settings.betas
    # Not add_(alpha=...): its vectorised loop fuses the product and the loop over the rest does not, so bits would depend on where
    # a row stands in the slab.
    m = state["exp_avg"].mul_(beta1).add_(g * (1 - beta1))
    v = state["exp_avg_sq"].mul_(beta2).add_(g.square() * (1 - beta2))
    size = step.lr * (1 - beta2**step.number) ** 0.5 / (1 - beta1**step.number)
    return w - size * m / (v.sqrt() + settings.eps)


def _adamw(w: torch.Tensor, state: State, g: torch.Tensor, settings: AdamW, step: Step) -> torch.Tensor:
    return _adam(w * (1 - step.lr * settings.weight_decay), state, g, settings, step)


def _rowwise_adam(w: torch.Tensor, state: State, g: torch.Tensor, settings: RowwiseAdam, step: Step) -> torch.Tensor:
    beta1, beta2 = settings.betas
    m = state["exp_avg"].mul_(beta1).add_(g * (1 - beta1))
    v_U = state["exp_avg_sq"].mul_(beta2).add_(step.mean_square * (1 - beta2))
    root = (1 - beta2**step.number) ** 0.5  # the bias correction of v, taken out of its root
    size = step.lr * root / (1 - beta1**step.number)
    return w * (1 - step.lr * settings.weight_decay) - size * m / (v_U.sqrt() + settings.eps * root).unsqueeze(1)


def _ftrl(w: torch.Tensor, state: State, g: torch.Tensor, settings: FTRL, step: Step) -> torch.Tensor:
    n, l1, lr = state["n"], settings.l1, step.lr
    start = -w * (settings.beta / lr + settings.l2) - w.sign() * l1  # the z that gives back w while n is 0
    z = torch.where(n == 0, start, state["z"])
    seen = n + g.square()
    z = z + g - (seen.sqrt() - n.sqrt()) / lr * w
    state["z"], state["n"] = z, seen
    scale = (settings.beta + seen.sqrt()) / lr + settings.l2
    shrunk = -(z - z.sign() * l1) / scale
    # scale is 0 only when beta, l2 and every gradient so far are 0: nothing has been learned, nothing moves.
    return torch.where(scale == 0, w, torch.where(z.abs() <= l1, torch.zeros_like(w), shrunk))


def _lion(w: torch.Tensor, state: State, g: torch.Tensor, settings: Lion, step: Step) -> torch.Tensor:
    (beta1, beta2), m = settings.betas, state["exp_avg"]
    direction = (m * beta1 + g * (1 - beta1)).sign()
    m.mul_(beta2).add_(g * (1 - beta2))
    return w * (1 - step.lr * settings.weight_decay) - step.lr * direction


FORMULAS: dict[type[TableOptimizer], Formula] = {
    SGD: _sgd,
    Adagrad: _adagrad,
    RowwiseAdagrad: _rowwise_adagrad,
    Adam: _adam,
    AdamW: _adamw,
    RowwiseAdam: _rowwise_adam,
    FTRL: _ftrl,
    Lion: _lion,
}
