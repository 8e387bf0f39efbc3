"""Optimizers' steps on a tile of rows: the formulas of `kernels.formulas`, operation by operation.

Each function takes weights, two pieces of state, gradients and the mean of g^2 over whole rows, all in the compute dtype, and the
numbers a to h as `bits_of` has them; it returns the new weights and the new pieces of state. State comes in the order of the
settings' `state`; what an optimizer does not have it gives back as it is. One number a row comes as `[MANY]`, one an element as
`[MANY, COLUMNS]`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from shardembed.kernels.triton.numbers import bits_of, number_of, quotient, root
from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, Lion, RowwiseAdagrad, RowwiseAdam, TableOptimizer

NUMBERS = 7
STATES = 2  # pieces of state at most


@triton.jit
def sgd(w, first, second, g, mean_square, a, b, c, d, e, f, h):
    """a: lr."""
    return w - number_of(a, g.dtype) * g, first, second


@triton.jit
def adagrad(w, total, second, g, mean_square, a, b, c, d, e, f, h):
    """a: lr. b: eps."""
    lr, eps = number_of(a, g.dtype), number_of(b, g.dtype)
    total = total + g * g
    return w - quotient(lr * g, root(total) + eps), total, second


@triton.jit
def rowwise_adagrad(w, total, second, g, mean_square, a, b, c, d, e, f, h):
    """a: lr. b: eps. total: one number a row."""
    lr, eps = number_of(a, g.dtype), number_of(b, g.dtype)
    total = total + mean_square
    return w - quotient(lr * g, (root(total) + eps)[:, None]), total, second


@triton.jit
def adam(w, m, v, g, mean_square, a, b, c, d, e, f, h):
    """AdamW too. a: beta1. b: 1 - beta1. c: beta2. d: 1 - beta2. e: lr, with bias correction. f: eps. h: the share of w that
    its decay leaves, 1 for Adam.
    """
    m = m * number_of(a, g.dtype) + g * number_of(b, g.dtype)
    v = v * number_of(c, g.dtype) + (g * g) * number_of(d, g.dtype)
    size, eps = number_of(e, g.dtype), number_of(f, g.dtype)
    return w * number_of(h, g.dtype) - quotient(size * m, root(v) + eps), m, v


@triton.jit
def rowwise_adam(w, m, v, g, mean_square, a, b, c, d, e, f, h):
    """The numbers of `adam`, but f: eps * sqrt(1 - beta2^t). v: one number a row."""
    m = m * number_of(a, g.dtype) + g * number_of(b, g.dtype)
    v = v * number_of(c, g.dtype) + mean_square * number_of(d, g.dtype)
    size, eps = number_of(e, g.dtype), number_of(f, g.dtype)
    return w * number_of(h, g.dtype) - quotient(size * m, (root(v) + eps)[:, None]), m, v


@triton.jit
def lion(w, m, second, g, mean_square, a, b, c, d, e, f, h):
    """a: lr. b: beta1. c: 1 - beta1. d: beta2. e: 1 - beta2. f: the share of w that its decay leaves."""
    mixed = m * number_of(b, g.dtype) + g * number_of(c, g.dtype)
    direction = tl.where(mixed != mixed, mixed, _sign(mixed))
    m = m * number_of(d, g.dtype) + g * number_of(e, g.dtype)
    return w * number_of(f, g.dtype) - number_of(a, g.dtype) * direction, m, second


@triton.jit
def ftrl(w, z, n, g, mean_square, a, b, c, d, e, f, h):
    """a: lr. b: beta / lr + l2, the divisor of weights that have not been updated yet. c: l1. d: beta. e: l2."""
    lr, l1 = number_of(a, g.dtype), number_of(c, g.dtype)
    start = -w * number_of(b, g.dtype) - _sign(w) * l1  # the z that gives back w while n is 0
    z = tl.where(n == 0, start, z)
    seen = n + g * g
    z = z + g - quotient(root(seen) - root(n), lr) * w
    scale = quotient(number_of(d, g.dtype) + root(seen), lr) + number_of(e, g.dtype)
    shrunk = quotient(-(z - _sign(z) * l1), scale)
    # scale is 0 only when beta, l2 and every gradient so far are 0: nothing has been learned, nothing moves.
    new = tl.where(scale == 0, w, tl.where(tl.abs(z) <= l1, tl.zeros_like(w), shrunk))
    return new, z, seen


@triton.jit
def _sign(x):
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@dataclass(frozen=True)
class Fused:
    """The step of an optimizer.

    Attributes:
        function: one from above.
        numbers: what it takes, at most 7, from the settings, the learning rate and the number of steps; in double precision, as the
            reference's are.
    """

    function: Any
    numbers: Callable[[Any, float, int], tuple[float, ...]]


def _adam_numbers(settings: Adam, lr: float, number: int) -> tuple[float, ...]:
    beta1, beta2 = settings.betas
    size = lr * (1 - beta2**number) ** 0.5 / (1 - beta1**number)
    kept = 1 - lr * settings.weight_decay if isinstance(settings, AdamW) else 1.0
    return beta1, 1 - beta1, beta2, 1 - beta2, size, settings.eps, kept


def _rowwise_adam_numbers(settings: RowwiseAdam, lr: float, number: int) -> tuple[float, ...]:
    beta1, beta2 = settings.betas
    root = (1 - beta2**number) ** 0.5
    kept = 1 - lr * settings.weight_decay
    return beta1, 1 - beta1, beta2, 1 - beta2, lr * root / (1 - beta1**number), settings.eps * root, kept


def _lion_numbers(settings: Lion, lr: float, number: int) -> tuple[float, ...]:
    beta1, beta2 = settings.betas
    return lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * settings.weight_decay


def _ftrl_numbers(settings: FTRL, lr: float, number: int) -> tuple[float, ...]:
    return lr, settings.beta / lr + settings.l2, settings.l1, settings.beta, settings.l2


FORMULAS: dict[type[TableOptimizer], Fused] = {
    SGD: Fused(sgd, lambda settings, lr, number: (lr,)),
    Adagrad: Fused(adagrad, lambda settings, lr, number: (lr, settings.eps)),
    RowwiseAdagrad: Fused(rowwise_adagrad, lambda settings, lr, number: (lr, settings.eps)),
    Adam: Fused(adam, _adam_numbers),
    AdamW: Fused(adam, _adam_numbers),
    RowwiseAdam: Fused(rowwise_adam, _rowwise_adam_numbers),
    FTRL: Fused(ftrl, _ftrl_numbers),
    Lion: Fused(lion, _lion_numbers),
}


def bits_of_numbers(settings: TableOptimizer, lr: float, number: int) -> tuple[int, ...]:
    """The numbers of a formula, filled up with zeros, by their bits."""
    numbers = FORMULAS[type(settings)].numbers(settings, lr, number)
    return tuple(bits_of(each) for each in (*numbers, *[0.0] * (NUMBERS - len(numbers))))
