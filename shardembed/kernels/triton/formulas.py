"""Every optimizer's step on a tile of rows: the formulas of `reference.py`, operation by operation.

Each takes weights, state and gradients in the compute dtype, and the settings that `settings_of` sends as numbers a to g; it
returns the new weights and the new state.
"""

import triton
import triton.language as tl

from shardembed.kernels.triton.numbers import bits_of, number_of, quotient, root
from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, RowwiseAdagrad, TableOptimizer

NUMBERS = 7
# The optimizer's state in the order in which the kernel takes it.
STATES: dict[type[TableOptimizer], tuple[str, ...]] = {
    SGD: (),
    Adagrad: ("sum",),
    RowwiseAdagrad: ("sum",),
    Adam: ("exp_avg", "exp_avg_sq"),
    AdamW: ("exp_avg", "exp_avg_sq"),
    FTRL: ("z", "n"),
}


def settings_of(optimizer: TableOptimizer, lr: float, step: int) -> tuple[int, ...]:
    """The numbers of a formula, computed in double precision as the reference does, by their bits (`bits_of`)."""
    match optimizer:
        case SGD():
            numbers: tuple[float, ...] = (lr,)
        case Adagrad() | RowwiseAdagrad():
            numbers = (lr, optimizer.eps)
        case Adam():
            beta1, beta2 = optimizer.betas
            size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
            kept = 1 - lr * optimizer.weight_decay if isinstance(optimizer, AdamW) else 1.0
            numbers = (beta1, 1 - beta1, beta2, 1 - beta2, size, optimizer.eps, kept)
        case FTRL():
            numbers = (lr, optimizer.beta / lr + optimizer.l2, optimizer.l1, optimizer.beta, optimizer.l2)
        case _:
            raise TypeError(f"no formula for {type(optimizer).__name__}")
    return tuple(bits_of(number) for number in (*numbers, *[0.0] * (NUMBERS - len(numbers))))


@triton.jit
def sgd(w, g, a):
    lr = number_of(a, g.dtype)
    return w - lr * g


@triton.jit
def adagrad(w, total, g, a, b):
    lr, eps = number_of(a, g.dtype), number_of(b, g.dtype)
    total = total + g * g
    return w - quotient(lr * g, root(total) + eps), total


@triton.jit
def rowwise_adagrad(w, total, mean_square, g, a, b):
    """total, mean_square: one number a row."""
    lr, eps = number_of(a, g.dtype), number_of(b, g.dtype)
    total = total + mean_square
    return w - quotient(lr * g, (root(total) + eps)[:, None]), total


@triton.jit
def adam(w, m, v, g, a, b, c, d, e, f, h):
    """AdamW too: h is the share of w that its decay leaves, 1 for Adam."""
    m = m * number_of(a, g.dtype) + g * number_of(b, g.dtype)
    v = v * number_of(c, g.dtype) + (g * g) * number_of(d, g.dtype)
    size, eps = number_of(e, g.dtype), number_of(f, g.dtype)
    return w * number_of(h, g.dtype) - quotient(size * m, root(v) + eps), m, v


@triton.jit
def ftrl(w, z, n, g, a, b, c, d, e):
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
