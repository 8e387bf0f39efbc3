"""Sparse optimizers, as frozen settings: formula, counterpart, and what happens to rows a step does not touch.

Notation: w a row's weights, g its gradient (duplicates of the row in the step's batches summed first), t the number of steps
taken. Only rows that occur in the step's batches are touched. All arithmetic is in float32 (float64 for float64 tables),
whatever the dtype of the table; optimizer state is kept in that dtype too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from shardembed.config.scalars import real
from shardembed.errors import ConfigError

StateShape = Literal["row", "element"]


@dataclass(frozen=True)
class TableOptimizer:
    """Base of the settings. `lr` is the learning rate; `se.Optimizer` puts it in a param group, so schedulers can change it.

    `state` names each state tensor and says whether it holds one number a row or one an element.
    """

    lr: float
    state: ClassVar[dict[str, StateShape]] = {}
    rowwise: ClassVar[bool] = False  # needs a statistic over the whole row, also where columns are cut

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            several = field.name == "betas" and isinstance(value, tuple)
            numbers = tuple(real(number) for number in (value if several else (value,)))
            if any(number is None or not math.isfinite(number) or number < 0 for number in numbers):
                raise ConfigError(f"{type(self).__name__}: {field.name} must be finite and not negative, not {value!r}")
            object.__setattr__(self, field.name, numbers if several else numbers[0])

    def describe(self) -> str:
        """Name and settings, to the last digit: ranks compare these texts."""
        settings = ", ".join(f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self) if field.name != "betas")
        betas = getattr(self, "betas", None)
        return f"{type(self).__name__}({settings}{f', betas={betas}' if betas else ''})"


def _short(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


@dataclass(frozen=True)
class SGD(TableOptimizer):
    """w <- w - lr * g. Counterpart: `torch.optim.SGD` without momentum. Untouched rows do not move."""

    lr: float = 1e-3


@dataclass(frozen=True)
class Adagrad(TableOptimizer):
    """sum <- sum + g^2;  w <- w - lr * g / (sqrt(sum) + eps).

    Counterpart: `torch.optim.Adagrad` (eps 1e-10, lr 1e-2, as there; no lr_decay, no weight decay). Untouched rows do not move.
    """

    lr: float = 1e-2
    eps: float = 1e-10
    state: ClassVar[dict[str, StateShape]] = {"sum": "element"}


@dataclass(frozen=True)
class RowwiseAdagrad(TableOptimizer):
    """sum <- sum + mean(g^2), one number a row;  w <- w - lr * g / (sqrt(sum) + eps).

    Counterpart: FBGEMM's `EmbOptimType.EXACT_ROWWISE_ADAGRAD` (eps 1e-8, lr 1e-2, as there). The mean is over the whole row,
    also where its columns are cut over ranks. Untouched rows do not move.
    """

    lr: float = 1e-2
    eps: float = 1e-8
    state: ClassVar[dict[str, StateShape]] = {"sum": "row"}
    rowwise: ClassVar[bool] = True


@dataclass(frozen=True)
class Adam(TableOptimizer):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr * sqrt(1 - b2^t) / (1 - b1^t) * m / (sqrt(v) + eps).

    Counterpart: `torch.optim.SparseAdam` (lr 1e-3, betas (0.9, 0.999), eps 1e-8, as there): t counts the optimizer's steps, eps
    is added before the bias correction, and the moments of untouched rows neither decay nor move their weights. It is not
    `torch.optim.Adam`, which moves every row at every step.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    state: ClassVar[dict[str, StateShape]] = {"exp_avg": "element", "exp_avg_sq": "element"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.betas, tuple) or len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"{type(self).__name__}: betas must be a tuple of two numbers in [0, 1), not {self.betas}")


@dataclass(frozen=True)
class AdamW(Adam):
    """w <- w - lr * weight_decay * w on touched rows, then Adam's update.

    Counterpart: decoupled weight decay (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; weight_decay
    1e-2 as in `torch.optim.AdamW`) over `torch.optim.SparseAdam`. Untouched rows neither decay nor move.
    """

    weight_decay: float = 1e-2


@dataclass(frozen=True)
class FTRL(TableOptimizer):
    """FTRL-proximal, per coordinate (McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013, algorithm 1):

        s = (sqrt(n + g^2) - sqrt(n)) / lr;  z <- z + g - s w;  n <- n + g^2
        w <- 0 if |z| <= l1 else -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2)

    Defaults beta 1, l1 0, l2 0. The paper starts at w = 0, z = 0. A table may start elsewhere: a coordinate with n = 0 first
    gets the z at which the closed form gives back its w (0 for w = 0). Untouched rows do not move. lr divides: a step for which
    a scheduler has set it to 0 changes nothing, state included.
    """

    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    state: ClassVar[dict[str, StateShape]] = {"z": "element", "n": "element"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr == 0:
            raise ConfigError("FTRL: lr divides, so it must be above 0")


@dataclass(frozen=True)
class NoOptimizer(TableOptimizer):
    """No optimizer of ours (`optimizer=None`): shards are Parameters, with dense or sparse COO gradients, for the user's own."""

    lr: float = 0.0
    sparse: bool = False

    def __post_init__(self) -> None:
        """Nothing to check: users do not make it."""

    def describe(self) -> str:
        return f"no optimizer, {'sparse' if self.sparse else 'dense'} gradients"


KINDS: tuple[type[TableOptimizer], ...] = (SGD, Adagrad, RowwiseAdagrad, Adam, AdamW, FTRL)


def refused(optimizer: object) -> str | None:
    """Why a table cannot have this optimizer; None where it can. A formula stands in several kernels for each of these classes, and
    for no other: a class made from one of them would learn as its parent.
    """
    if type(optimizer) in KINDS:
        return None
    known, name = ", ".join(kind.__name__ for kind in KINDS), type(optimizer).__name__
    derived = isinstance(optimizer, TableOptimizer)
    return f"the optimizer must be one of se.optim ({known}), or None for Parameters of your own torch optimizer, not {name}" + (
        f", which is made from {type(optimizer).__mro__[1].__name__}: kernels know these classes only" if derived else ""
    )
