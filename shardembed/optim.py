"""Sparse optimizers, as frozen settings: formula, counterpart, and what happens to rows a step does not touch.

An optimizer is a class here, in `KINDS`, and its formula in `kernels.formulas`. Names in YAML files and on the command line,
sections of settings, the planner's ops and the reference page follow from these; the kernels for CPUs and GPUs may have it too,
each in a table of its own. Tests name what an optimizer of `KINDS` lacks.

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
    """Base of the settings.

    Attributes:
        lr: learning rate; `se.Optimizer` puts it in a param group, so schedulers can change it.
        state: names each state tensor, all zero at the start, and says whether it holds one number a row or one an element.
        rowwise: the formula takes the mean of g^2 over the whole row, also where its columns are cut over ranks.
        lr_divides: a step whose learning rate is 0 (a scheduler may start there) changes nothing, state included.
        stepped: by us. Otherwise shards are Parameters, for the user's own torch optimizer.
    """

    lr: float = 1e-3
    state: ClassVar[dict[str, StateShape]] = {}
    rowwise: ClassVar[bool] = False
    lr_divides: ClassVar[bool] = False
    stepped: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            several = isinstance(field.default, tuple) and isinstance(value, tuple)
            numbers = tuple(real(number) for number in (value if several else (value,)))
            if any(number is None or not math.isfinite(number) or number < 0 for number in numbers):
                raise ConfigError(f"{type(self).__name__}: {field.name} must be finite and not negative, not {value!r}")
            object.__setattr__(self, field.name, numbers if several else numbers[0])
            if field.name == "betas" and not (several and len(numbers) == 2 and all(0 <= beta < 1 for beta in value)):
                raise ConfigError(f"{type(self).__name__}: betas must be a tuple of two numbers in [0, 1), not {value!r}")
        if self.lr_divides and self.lr == 0:
            raise ConfigError(f"{type(self).__name__}: lr divides, so it must be above 0")

    def describe(self) -> str:
        """Name and settings, to the last digit: ranks compare these texts."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        numbers = [f"{name}={_short(value)}" for name, value in values if not isinstance(value, tuple)]
        several = [f"{name}={value}" for name, value in values if isinstance(value, tuple)]
        return f"{type(self).__name__}({', '.join([*numbers, *several])})"


def _short(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(number)


@dataclass(frozen=True)
class SGD(TableOptimizer):
    """w <- w - lr * g. Counterpart: `torch.optim.SGD` without momentum. Untouched rows do not move.

    Attributes:
        lr: learning rate.
    """

    lr: float = 1e-3


@dataclass(frozen=True)
class Adagrad(TableOptimizer):
    """sum <- sum + g^2;  w <- w - lr * g / (sqrt(sum) + eps).

    Counterpart: `torch.optim.Adagrad` (eps 1e-10, lr 1e-2, as there; no lr_decay, no weight decay). Untouched rows do not move.

    Attributes:
        lr: learning rate.
        eps: keeps the quotient finite.
    """

    lr: float = 1e-2
    eps: float = 1e-10
    state: ClassVar[dict[str, StateShape]] = {"sum": "element"}


@dataclass(frozen=True)
class RowwiseAdagrad(TableOptimizer):
    """sum <- sum + mean(g^2), one number a row;  w <- w - lr * g / (sqrt(sum) + eps).

    Counterpart: FBGEMM's `EmbOptimType.EXACT_ROWWISE_ADAGRAD` (eps 1e-8, lr 1e-2, as there). The mean is over the whole row,
    also where its columns are cut over ranks. Untouched rows do not move.

    Attributes:
        lr: learning rate.
        eps: keeps the quotient finite.
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

    Attributes:
        lr: learning rate.
        betas: (b1, b2).
        eps: keeps the quotient finite.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    state: ClassVar[dict[str, StateShape]] = {"exp_avg": "element", "exp_avg_sq": "element"}


@dataclass(frozen=True)
class AdamW(Adam):
    """w <- w - lr * weight_decay * w on touched rows, then Adam's update.

    Counterpart: decoupled weight decay (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; weight_decay
    1e-2 as in `torch.optim.AdamW`) over `torch.optim.SparseAdam`. Untouched rows neither decay nor move.

    Attributes:
        weight_decay: the share of a weight that decays, times lr.
    """

    weight_decay: float = 1e-2


@dataclass(frozen=True)
class RowwiseAdam(TableOptimizer):
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) mean(g^2), one number a row;
    w <- w - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * w).

    Counterpart: FBGEMM's `EmbOptimType.PARTIAL_ROWWISE_ADAM` (lr 1e-2, betas (0.9, 0.999), eps 1e-8, weight_decay 0, as there):
    half of Adam's state, and eps is added after the bias correction, which in `Adam` comes before it. The mean is over the whole
    row, also where its columns are cut over ranks; FBGEMM knows each strip alone. t counts the optimizer's steps, there the
    lookups. Untouched rows neither decay nor move, and their moments stay.

    Attributes:
        lr: learning rate.
        betas: (b1, b2).
        eps: keeps the quotient finite.
        weight_decay: the share of a weight that decays, times lr.
    """

    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    state: ClassVar[dict[str, StateShape]] = {"exp_avg": "element", "exp_avg_sq": "row"}
    rowwise: ClassVar[bool] = True


@dataclass(frozen=True)
class FTRL(TableOptimizer):
    """FTRL-proximal, per coordinate (McMahan et al., "Ad click prediction: a view from the trenches", KDD 2013, algorithm 1):

        s = (sqrt(n + g^2) - sqrt(n)) / lr;  z <- z + g - s w;  n <- n + g^2
        w <- 0 if |z| <= l1 else -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2)

    Defaults beta 1, l1 0, l2 0. The paper starts at w = 0, z = 0. A table may start elsewhere: a coordinate with n = 0 first
    gets the z at which the closed form gives back its w (0 for w = 0). Untouched rows do not move. lr divides: a step for which
    a scheduler has set it to 0 changes nothing, state included.

    Attributes:
        lr: learning rate.
        beta: smooths the learning rate of coordinates that were seen rarely.
        l1: weights whose z is not above it are 0.
        l2: shrinks weights.
    """

    lr: float = 0.1
    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    state: ClassVar[dict[str, StateShape]] = {"z": "element", "n": "element"}
    lr_divides: ClassVar[bool] = True


@dataclass(frozen=True)
class Lion(TableOptimizer):
    """w <- w - lr * (sign(b1 m + (1 - b1) g) + weight_decay * w);  m <- b2 m + (1 - b2) g.

    Counterpart: Lion (Chen et al., "Symbolic discovery of optimization algorithms", NeurIPS 2023, program 1; defaults lr 1e-4,
    betas (0.9, 0.99), weight_decay 0 as in its authors' code). There every weight moves in every step; here untouched rows
    neither decay nor move, and their m stays.

    Attributes:
        lr: learning rate.
        betas: (b1, b2).
        weight_decay: the share of a weight that decays, times lr.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    state: ClassVar[dict[str, StateShape]] = {"exp_avg": "element"}


@dataclass(frozen=True)
class NoOptimizer(TableOptimizer):
    """No optimizer of ours (`optimizer=None`): shards are Parameters, with dense or sparse COO gradients, for the user's own.

    Attributes:
        lr: of no use here.
        sparse: gradients are sparse COO tensors; else dense ones.
    """

    lr: float = 0.0
    sparse: bool = False
    stepped: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Nothing to check: users do not make it."""

    def describe(self) -> str:
        return f"no optimizer, {'sparse' if self.sparse else 'dense'} gradients"


# What a table can have: the one list of them.
KINDS: tuple[type[TableOptimizer], ...] = (SGD, Adagrad, RowwiseAdagrad, Adam, AdamW, RowwiseAdam, FTRL, Lion)
NAMES: dict[str, type[TableOptimizer]] = {kind.__name__: kind for kind in KINDS}


def refused(optimizer: object) -> str | None:
    """Why a table cannot have this optimizer; None where it can. Formulas belong to the classes of `KINDS` and to no other: a class
    made from one of them would learn as its parent.
    """
    if type(optimizer) in KINDS:
        return None
    known, name = ", ".join(NAMES), type(optimizer).__name__
    derived = isinstance(optimizer, TableOptimizer)
    return f"the optimizer must be one of se.optim ({known}), or None for Parameters of your own torch optimizer, not {name}" + (
        f", which is made from {type(optimizer).__mro__[1].__name__}: kernels know these classes only" if derived else ""
    )
