"""Updates of rows, in place, by optimizer: the formulas of `kernels.formulas`, up to rounding (torch's square root is MKL's, which
is not always the nearest; squares of a row are summed in another order here, and RowwiseAdagrad divides only once).

A formula is a function of numbers, compiled into the one loop over rows (`_update`):

    (held, g, of_row, numbers) -> held    one column: its weight and then its state, in the order that the optimizer declares
    (held, square, numbers) -> (held, of_row)    of optimizers that keep a number a row: that state, and what the columns need of it

g is the summed gradient, times the factor; square the mean of its square over the row. What formulas read of settings, `numbers`,
has the dtype of the weights, as torch's scalars become; a constant in a formula must have it too, or float32 is widened.

Legend: E entries, S segments, U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np

from shardembed.kernels.numba.elements import fetch_each, load, load_each, store, store_each
from shardembed.kernels.numba.ordering import sorted_words
from shardembed.kernels.numba.tools import called, compiled, reassociated

AHEAD = 16  # entries; rows lie anywhere in memory, so each is asked for before its turn


@reassociated
def _mean_square(grad_W: Any) -> Any:
    total = grad_W.dtype.type(0)
    for j in range(grad_W.size):
        g = load(grad_W, j)
        total += g * g
    return total / grad_W.dtype.type(grad_W.size)


@called
def _nothing(held: Any, square: Any, numbers: Any) -> Any:
    """Of the row, for optimizers that keep no number of it."""
    return held, square


ROW = COLUMN = _nothing  # in the loop: formulas, see `_in_loop`


def _update(slab: Any, waiting: Any, squares_U: Any, factor: Any, numbers: Any) -> None:
    """Sum the gradients of each row, in the order of arrival, and apply the formulas to it.

    Args:
        slab: (flat arrays with W elements a row, the weights first; those with one).
        waiting: as `Gradients`: rows_E, offsets (empty where every segment is a single row), grads_SW.
        squares_U: the mean of g^2 over whole rows where these rows are not whole; then they are distinct and ascend. Else empty.
    """
    by_column, by_row = slab
    rows_E, offsets, grads_SW = waiting
    width, grads = grads_SW.shape[1], grads_SW.reshape(-1)
    words_E, low = sorted_words(rows_E, offsets, by_column[0].size // width)
    count, mask, gradients = words_E.size, (1 << low) - 1, (grads,)
    grad_W, zero, one = np.empty(width, grads.dtype), grads.dtype.type(0), grads.dtype.type(1)
    e, u = 0, 0
    while e < count:
        word = load(words_E, e)
        number, first = word >> low, (word & mask) * width
        for j in range(width):
            store(grad_W, j, zero + load(grads, first + j))  # a sum that begins with -0 would be another
        while True:
            if e + AHEAD < count:
                word = load(words_E, e + AHEAD)
                fetch_each(gradients, (word & mask) * width, width)
                if word >> low != load(words_E, e + AHEAD - 1) >> low:  # else the entry before has asked for it
                    fetch_each(by_column, (word >> low) * width, width)
                    fetch_each(by_row, word >> low, 1)
            e += 1
            if e == count:
                break
            word = load(words_E, e)
            if word >> low != number:
                break
            first = (word & mask) * width
            for j in range(width):
                store(grad_W, j, load(grad_W, j) + load(grads, first + j))
        if factor != one:
            for j in range(width):
                store(grad_W, j, load(grad_W, j) * factor)
        square = zero
        if len(by_row) > 0:
            square = load(squares_U, u) if squares_U.size else _mean_square(grad_W)
        held, of_row = ROW(load_each(by_row, number), square, numbers)
        store_each(by_row, number, held)
        first = number * width
        for j in range(width):
            store_each(by_column, first + j, COLUMN(load_each(by_column, first + j), load(grad_W, j), of_row, numbers))
        u += 1


def _in_loop(row: Any = _nothing) -> Callable[[Callable[..., Any]], Any]:
    """Makes of the formula of a column, and of one of its row, the update of a slab. Numba keeps no kernel on the disk that takes
    functions or closes over them, so the loop finds the two among its globals.
    """

    def made(column: Callable[..., Any]) -> Any:
        update = FunctionType(_update.__code__, {**globals(), "ROW": row, "COLUMN": called(column)}, column.__name__)
        update.__qualname__ = column.__name__
        return compiled(update)

    return made


@_in_loop()
def sgd(held: Any, g: Any, of_row: Any, numbers: Any) -> Any:
    (w,), (lr,) = held, numbers
    return (w - lr * g,)


@_in_loop()
def adagrad(held: Any, g: Any, of_row: Any, numbers: Any) -> Any:
    (w, n), (lr, eps) = held, numbers
    n = n + g * g
    return w - lr * g / (np.sqrt(n) + eps), n


@called
def _scale(held: Any, square: Any, numbers: Any) -> Any:
    (n,), (lr, eps) = held, numbers
    n = n + square
    return (n,), lr / (np.sqrt(n) + eps)


@_in_loop(_scale)
def rowwise_adagrad(held: Any, g: Any, scale: Any, numbers: Any) -> Any:
    return (held[0] - scale * g,)


@_in_loop()
def adam(held: Any, g: Any, of_row: Any, numbers: Any) -> Any:
    """size: of the step, bias corrected. kept: what is left of a weight (1 - lr decay). new1, new2: 1 - beta1, 1 - beta2."""
    (w, m, v), (size, kept, eps, beta1, beta2, new1, new2) = held, numbers
    m = m * beta1 + g * new1
    v = v * beta2 + g * g * new2
    return w * kept - size * m / (np.sqrt(v) + eps), m, v


@called
def _divisor(held: Any, square: Any, numbers: Any) -> Any:
    (v,), (_, _, eps, _, beta2, _, new2) = held, numbers
    v = v * beta2 + square * new2
    return (v,), np.sqrt(v) + eps


@_in_loop(_divisor)
def rowwise_adam(held: Any, g: Any, divisor: Any, numbers: Any) -> Any:
    """As `adam`, eps times sqrt(1 - beta2^t)."""
    (w, m), (size, kept, _, beta1, _, new1, _) = held, numbers
    m = m * beta1 + g * new1
    return w * kept - size * m / divisor, m


@_in_loop()
def lion(held: Any, g: Any, of_row: Any, numbers: Any) -> Any:
    """kept, new1, new2: as in `adam`."""
    (w, m), (lr, kept, beta1, beta2, new1, new2) = held, numbers
    direction = np.sign(m * beta1 + g * new1)
    return w * kept - lr * direction, m * beta2 + g * new2


@_in_loop()
def ftrl(held: Any, g: Any, of_row: Any, numbers: Any) -> Any:
    """start: beta / lr + l2, the divisor of weights that have not been updated yet."""
    (w, z, n), (lr, beta, l1, l2, start) = held, numbers
    zero = lr - lr  # of its dtype
    z = -w * start - np.sign(w) * l1 if n == zero else z
    seen = n + g * g
    z = z + g - (np.sqrt(seen) - np.sqrt(n)) / lr * w
    scale = (beta + np.sqrt(seen)) / lr + l2
    shrunk = -(z - np.sign(z) * l1) / scale
    moved = zero if abs(z) <= l1 else shrunk
    return (w if scale == zero else moved), z, seen


@compiled
def square_sums(grads_UW: Any) -> Any:
    """The sum of g^2 of each row, float64 `[U]`."""
    found = np.empty(grads_UW.shape[0], np.float64)
    for u in range(grads_UW.shape[0]):
        found[u] = _square_sum(grads_UW[u])
    return found


@reassociated
def _square_sum(grad_W: Any) -> Any:
    total = 0.0
    for j in range(grad_W.size):
        total += np.float64(grad_W[j]) * np.float64(grad_W[j])
    return total
