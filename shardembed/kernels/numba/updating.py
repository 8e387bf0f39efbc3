"""Every optimizer's update of distinct rows, in place: the formulas of `kernels.reference`, up to rounding (torch's square root is
 MKL's, which is not always the nearest; RowwiseAdagrad here sums a row in another order and divides it only once).

weights and states are `[rows, W]` or `[rows]`, rows_U is int64 `[U]`, grads_UW is merged. The numbers are of the weights' dtype,
as torch's scalars become. Rows lie anywhere in memory, so each is asked for some rows ahead.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from shardembed.kernels.numba.tools import OPTIONS, compiled, fetch_row

AHEAD = 16  # rows


@numba.njit(**OPTIONS, fastmath={"reassoc"})
def _mean_square(grad_W: Any) -> Any:
    total = grad_W[0] * grad_W[0]
    for j in range(1, grad_W.size):
        total += grad_W[j] * grad_W[j]
    return total / grad_W.dtype.type(grad_W.size)


@compiled
def sgd(weights: Any, rows_U: Any, grads_UW: Any, lr: Any) -> None:
    flat, width, count = weights.reshape(-1), weights.shape[1], rows_U.size
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
        w, g = weights[rows_U[u]], grads_UW[u]
        for j in range(width):
            w[j] = w[j] - lr * g[j]


@compiled
def rowwise_adagrad(weights: Any, sums: Any, rows_U: Any, grads_UW: Any, squares_U: Any, lr: Any, eps: Any) -> None:
    """squares_U: the mean of g^2 over whole rows, or empty where these are whole rows."""
    flat, width, count = weights.reshape(-1), weights.shape[1], rows_U.size
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(sums, rows_U[u + AHEAD], 1)
        row, g = rows_U[u], grads_UW[u]
        seen = sums[row] + (squares_U[u] if squares_U.size else _mean_square(g))
        sums[row] = seen
        scale = lr / (np.sqrt(seen) + eps)
        w = weights[row]
        for j in range(width):
            w[j] = w[j] - scale * g[j]


@compiled
def adagrad(weights: Any, sums: Any, rows_U: Any, grads_UW: Any, lr: Any, eps: Any) -> None:
    flat, flat_sums, width, count = weights.reshape(-1), sums.reshape(-1), weights.shape[1], rows_U.size
    for u in range(count):
        if u + AHEAD < count:
            fetch_row(flat, rows_U[u + AHEAD], width)
            fetch_row(flat_sums, rows_U[u + AHEAD], width)
        w, n, g = weights[rows_U[u]], sums[rows_U[u]], grads_UW[u]
        for j in range(width):
            n[j] = n[j] + g[j] * g[j]
            w[j] = w[j] - lr * g[j] / (np.sqrt(n[j]) + eps)


@compiled
def adam(
    weights: Any, means: Any, squares: Any, rows_U: Any, grads_UW: Any, size: Any, kept: Any, eps: Any, beta: Any, new: Any
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
            m[j] = m[j] * beta[0] + g[j] * new[0]
            v[j] = v[j] * beta[1] + g[j] * g[j] * new[1]
            w[j] = w[j] * kept - size * m[j] / (np.sqrt(v[j]) + eps)


@compiled
def ftrl(weights: Any, z: Any, n: Any, rows_U: Any, grads_UW: Any, lr: Any, beta: Any, l1: Any, l2: Any, start: Any) -> None:
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
            old, before = w[j], n_W[j]
            held = -old * start - np.sign(old) * l1 if before == zero else z_W[j]
            seen = before + g[j] * g[j]
            held = held + g[j] - (np.sqrt(seen) - np.sqrt(before)) / lr * old
            scale = (beta + np.sqrt(seen)) / lr + l2
            shrunk = -(held - np.sign(held) * l1) / scale
            z_W[j], n_W[j] = held, seen
            if scale != zero:
                w[j] = zero if abs(held) <= l1 else shrunk
