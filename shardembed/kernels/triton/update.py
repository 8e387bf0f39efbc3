"""Merge and update, fused: a program sums the gradients of a tile of distinct rows and takes the optimizer's step on them.

Each distinct row belongs to one program, so weights and state are written in place, once.
"""

import torch
import triton
import triton.language as tl

from shardembed.kernels import rounding
from shardembed.kernels.reference import Gradients
from shardembed.kernels.triton.formulas import STATES, adagrad, adam, ftrl, rowwise_adagrad, settings_of, sgd
from shardembed.kernels.triton.noise import Blocks, stochastic
from shardembed.kernels.triton.numbers import bits_of, nearest, number_of, quotient, widen
from shardembed.kernels.triton.order import Order
from shardembed.kernels.triton.sums import Runs, sum_of_runs
from shardembed.kernels.triton.tiles import Tile, launch
from shardembed.optim import FTRL, TableOptimizer


def update(
    weights: torch.Tensor,
    state: dict[str, torch.Tensor],
    optimizer: TableOptimizer,
    lr: float,
    step: int,
    waiting: Gradients,
    order: Order,
    factor: float = 1.0,
    mean_square_U: torch.Tensor | None = None,
    blocks: Blocks | None = None,
) -> None:
    """`reference.merge` and `reference.update` in one, in place. Waits for nothing.

    Args:
        factor: multiplies the merged gradients.
        mean_square_U: the mean of g^2 over whole rows, by distinct row, where this slab holds only some of their columns.
        blocks: where the slab's rows come from, to round at random; to the nearest by default.
    """
    assert weights.is_contiguous()
    if not order.bound or (lr == 0 and isinstance(optimizer, FTRL)):  # whose lr divides; a scheduler may start at 0
        return
    width = weights.shape[1]
    tile = Tile.of(width)
    first, second, *_ = [*(state[name] for name in STATES[type(optimizer)]), weights, weights]  # weights where there is none
    runs = Runs.of(waiting.grads_SW, order, tile)
    launch(
        _update,
        tile.lasting_programs(order.bound, weights.device),
        weights,
        first,
        second,
        weights if mean_square_U is None else mean_square_U.contiguous(),
        *runs.arguments,
        weights if blocks is None else blocks.facts,
        0 if blocks is None else blocks.count,
        rounding.stepped(step),
        bits_of(factor),
        *settings_of(optimizer, lr, step),
        KIND=type(optimizer).__name__,
        GIVEN=mean_square_U is not None,
        WIDTH=width,
        PIECES=order.pieces is not None,
        HALVINGS=0 if blocks is None else blocks.count.bit_length(),
        **tile.constants,
        enable_fp_fusion=False,  # products and sums rounded one by one, as the reference's are
    )


@triton.jit(do_not_specialize=["blocks_count", "stepped", "factor", "a", "b", "c", "d", "e", "f", "h"])
def _update(
    weights,
    first_state,
    second_state,
    mean_squares,
    grads,
    partials,
    rows_E,
    segments_E,
    starts,
    piece_starts,
    count,
    blocks,
    blocks_count,
    stepped,
    factor,
    a,
    b,
    c,
    d,
    e,
    f,
    h,
    KIND: tl.constexpr,
    GIVEN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
    PIECES: tl.constexpr,
    HALVINGS: tl.constexpr,
    AHEAD: tl.constexpr,
):
    runs = tl.load(count)
    columns = tl.arange(0, COLUMNS)
    wanted = columns < WIDTH
    for tile in range(tl.program_id(0), tl.cdiv(runs, MANY), tl.num_programs(0)):
        run = tile * MANY + tl.arange(0, MANY).to(tl.int64)
        live = run < runs
        g = sum_of_runs(grads, partials, segments_E, starts, piece_starts, run, live, wanted, WIDTH, COLUMNS, MANY, PIECES, AHEAD)
        g *= number_of(factor, g.dtype)
        row = tl.load(rows_E + tl.load(starts + run, mask=live, other=0), mask=live, other=0).to(tl.int64)
        at = row[:, None] * WIDTH + columns[None, :]  # in 64 bits: a table may have more than 2^31 elements
        mask = live[:, None] & wanted[None, :]
        w = widen(tl.load(weights + at, mask=mask, other=0.0), g.dtype)
        if KIND == "SGD":
            new = sgd(w, g, a)
        elif KIND == "RowwiseAdagrad":
            if GIVEN:
                mean_square = tl.load(mean_squares + run, mask=live, other=0.0)
            else:
                mean_square = quotient(tl.sum(g * g, 1), tl.full([MANY], WIDTH, g.dtype))
            new, total = rowwise_adagrad(w, tl.load(first_state + row, mask=live, other=0.0), mean_square, g, a, b)
            tl.store(first_state + row, total, mask=live)
        elif KIND == "Adagrad":
            new, total = adagrad(w, tl.load(first_state + at, mask=mask, other=0.0), g, a, b)
            tl.store(first_state + at, total, mask=mask)
        else:
            first = tl.load(first_state + at, mask=mask, other=0.0)
            second = tl.load(second_state + at, mask=mask, other=0.0)
            if KIND == "FTRL":
                new, first, second = ftrl(w, first, second, g, a, b, c, d, e)
            else:
                new, first, second = adam(w, first, second, g, a, b, c, d, e, f, h)
            tl.store(first_state + at, first, mask=mask)
            tl.store(second_state + at, second, mask=mask)
        if HALVINGS:
            narrow = stochastic(new, weights.dtype.element_ty, row, live, blocks, blocks_count, stepped, HALVINGS)
        else:
            narrow = nearest(new, weights.dtype.element_ty)
        tl.store(weights + at, narrow, mask=mask)
