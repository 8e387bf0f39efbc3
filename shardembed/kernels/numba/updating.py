"""Updates of distinct rows, in place, by optimizer: the formulas of `kernels.formulas`, up to rounding (torch's square root is
MKL's, which is not always the nearest; squares of a row are summed in another order here, and RowwiseAdagrad divides only once).

weights and states are `[rows, W]` or `[rows]`, rows_U is int64 `[U]`, grads_UW is merged and counts `factor` times. The numbers are
of the weights' dtype, as torch's scalars become. Rows lie anywhere in memory, so each is asked for some rows ahead.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shardembed.kernels.numba.tools import compiled, fetch_row, reassociated

AHEAD = 16  # rows


@reassociated
def _mean_square(grad_W: Any, factor: Any) -> Any:
    total = grad_W.dtype.type(0)
    for j in range(grad_W.size):
        g = grad_W[j] * factor
        total += g * g
    return total / grad_W.dtype.type(grad_W.size)


@compiled
def sgd(weights: Any, rows_U: Any, grads_UW: Any, factor: Any, lr: Any) -> None:
    flat, width, count = weights.reshape(-1), weights.shape[1], rows_U.size
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
        w, g = weights[rows_U[u]], grads_UW[u]
        for j in range(width):
            w[j] = w[j] - lr * (g[j] * factor)


@compiled
def rowwise_adagrad(weights: Any, sums: Any, rows_U: Any, grads_UW: Any, factor: Any, squares_U: Any, lr: Any, eps: Any) -> None:
    """squares_U: the mean of g^2 over whole rows, or empty where these are whole rows."""
    flat, width, count = weights.reshape(-1), weights.shape[1], rows_U.size
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(sums, rows_U[u + AHEAD], 1)
        row, g = rows_U[u], grads_UW[u]
        seen = sums[row] + (squares_U[u] if squares_U.size else _mean_square(g, factor))
        sums[row] = seen
        scale = lr / (np.sqrt(seen) + eps)
        w = weights[row]
        for j in range(width):
            w[j] = w[j] - scale * (g[j] * factor)


@compiled
def adagrad(weights: Any, sums: Any, rows_U: Any, grads_UW: Any, factor: Any, lr: Any, eps: Any) -> None:
    flat, flat_sums, width, count = weights.reshape(-1), sums.reshape(-1), weights.shape[1], rows_U.size
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(flat_sums, rows_U[u + AHEAD], width)
        w, n, g = weights[rows_U[u]], sums[rows_U[u]], grads_UW[u]
        for j in range(width):
            g_j = g[j] * factor
            n[j] = n[j] + g_j * g_j
            w[j] = w[j] - lr * g_j / (np.sqrt(n[j]) + eps)


@compiled
def adam(
    weights: Any,
    means: Any,
    squares: Any,
    rows_U: Any,
    grads_UW: Any,
    factor: Any,
    size: Any,
    kept: Any,
    eps: Any,
    beta: Any,
    new: Any,
) -> None:
    """size: of the step, bias corrected. kept: what is left of a weight (1 - lr decay). new: 1 - beta1 and 1 - beta2."""
    flat, width, count = weights.reshape(-1), weights.shape[1], rows_U.size
    flat_means, flat_squares = means.reshape(-1), squares.reshape(-1)
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(flat_means, rows_U[u + AHEAD], width)
            fetch_row(flat_squares, rows_U[u + AHEAD], width)
        row, g = rows_U[u], grads_UW[u]
        w, m, v = weights[row], means[row], squares[row]
        for j in range(width):
            g_j = g[j] * factor
            m[j] = m[j] * beta[0] + g_j * new[0]
            v[j] = v[j] * beta[1] + g_j * g_j * new[1]
            w[j] = w[j] * kept - size * m[j] / (np.sqrt(v[j]) + eps)


@compiled
def rowwise_adam(
    weights: Any,
    means: Any,
    squares: Any,
    rows_U: Any,
    grads_UW: Any,
    factor: Any,
    squares_U: Any,
    size: Any,
    kept: Any,
    eps: Any,
    beta: Any,
    new: Any,
) -> None:
    """squares: one number a row. squares_U: as in `rowwise_adagrad`. The others: as in `adam`,
    eps times sqrt(1 - beta2^t).
    """
    flat, width, count = weights.reshape(-1), weights.shape[1], rows_U.size
    flat_means = means.reshape(-1)
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(flat_means, rows_U[u + AHEAD], width)
            fetch_row(squares, rows_U[u + AHEAD], 1)
        row, g = rows_U[u], grads_UW[u]
        square = squares[row] * beta[1] + (squares_U[u] if squares_U.size else _mean_square(g, factor)) * new[1]
        squares[row] = square
        divisor = np.sqrt(square) + eps
        w, m = weights[row], means[row]
        for j in range(width):
            m[j] = m[j] * beta[0] + g[j] * factor * new[0]
            w[j] = w[j] * kept - size * m[j] / divisor


@compiled
def lion(weights: Any, means: Any, rows_U: Any, grads_UW: Any, factor: Any, lr: Any, kept: Any, beta: Any, new: Any) -> None:
    """kept, new: as in `adam`."""
    flat, flat_means, width, count = weights.reshape(-1), means.reshape(-1), weights.shape[1], rows_U.size
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(flat_means, rows_U[u + AHEAD], width)
        w, m, g = weights[rows_U[u]], means[rows_U[u]], grads_UW[u]
        for j in range(width):
            g_j = g[j] * factor
            direction = np.sign(m[j] * beta[0] + g_j * new[0])
            m[j] = m[j] * beta[1] + g_j * new[1]
            w[j] = w[j] * kept - lr * direction


@compiled
def ftrl(
    weights: Any, z: Any, n: Any, rows_U: Any, grads_UW: Any, factor: Any, lr: Any, beta: Any, l1: Any, l2: Any, start: Any
) -> None:
    """start: beta / lr + l2, the divisor of weights that have not been updated yet."""
    flat, width, count = weights.reshape(-1), weights.shape[1], rows_U.size
    flat_z, flat_n = z.reshape(-1), n.reshape(-1)
    zero = weights.dtype.type(0)
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(flat_z, rows_U[u + AHEAD], width)
            fetch_row(flat_n, rows_U[u + AHEAD], width)
        row, g = rows_U[u], grads_UW[u]
        w, z_W, n_W = weights[row], z[row], n[row]
        for j in range(width):
            old, before, g_j = w[j], n_W[j], g[j] * factor
            held = -old * start - np.sign(old) * l1 if before == zero else z_W[j]
            seen = before + g_j * g_j
            held = held + g_j - (np.sqrt(seen) - np.sqrt(before)) / lr * old
            scale = (beta + np.sqrt(seen)) / lr + l2
            shrunk = -(held - np.sign(held) * l1) / scale
            z_W[j], n_W[j] = held, seen
            if scale != zero:
                w[j] = zero if abs(held) <= l1 else shrunk


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
