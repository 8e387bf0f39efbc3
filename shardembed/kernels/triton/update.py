"""Merge and update, fused: a program sums the gradients of a tile of distinct rows and takes the optimizer's step on them.

Each distinct row belongs to one program, so weights and state are written in place, once.
"""

import torch
import triton
import triton.language as tl

from shardembed.kernels import rounding
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData
from shardembed.kernels.triton.formulas import FORMULAS, STATES, bits_of_numbers
from shardembed.kernels.triton.noise import stochastic
from shardembed.kernels.triton.numbers import bits_of, nearest, number_of, quotient, widen
from shardembed.kernels.triton.order import Order
from shardembed.kernels.triton.sums import Runs, sum_of_runs
from shardembed.kernels.triton.tiles import Tile, launch


def update(
    data: SlabData,
    waiting: Gradients,
    order: Order,
    lr: float,
    number: int,
    factor: float = 1.0,
    mean_square_U: torch.Tensor | None = None,
) -> None:
    """Merge the gradients of each row, and apply one optimizer step to the sums times `factor`, in place. Waits for nothing.

    Args:
        order: of `waiting`.
        mean_square_U: the mean of g^2 over whole rows, by distinct row, where this slab holds only some of their columns.
    """
    weights, optimizer, blocks = data.weights, data.optimizer, data.blocks
    assert weights.is_contiguous()
    assert not isinstance(blocks, rounding.Named), "rows whose noise these kernels do not know"
    if not order.bound:
        return
    width = weights.shape[1]
    tile = Tile.of(width)
    held = [data.state[name] for name in optimizer.state]
    first, second = [*held, *[weights] * (STATES - len(held))]  # weights where there is none
    shapes = [*optimizer.state.values(), *[""] * (STATES - len(held))]
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
        rounding.stepped(number),
        bits_of(factor),
        *bits_of_numbers(optimizer, lr, number),
        FORMULA=FORMULAS[type(optimizer)].function,
        FIRST=shapes[0],
        SECOND=shapes[1],
        ROWWISE=optimizer.rowwise,
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
    FORMULA: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWWISE: tl.constexpr,
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
        first = _load(first_state, row, at, live, mask, g, FIRST)
        second = _load(second_state, row, at, live, mask, g, SECOND)
        mean_square = g  # of no use
        if GIVEN:
            mean_square = tl.load(mean_squares + run, mask=live, other=0.0)
        elif ROWWISE:
            mean_square = quotient(tl.sum(g * g, 1), tl.full([MANY], WIDTH, g.dtype))
        new, first, second = FORMULA(w, first, second, g, mean_square, a, b, c, d, e, f, h)
        if HALVINGS:
            narrow = stochastic(new, weights.dtype.element_ty, row, live, blocks, blocks_count, stepped, HALVINGS)
        else:
            narrow = nearest(new, weights.dtype.element_ty)
        # What several threads need (one number a row, say) each of them loads, and one stores: not before all have it.
        tl.debug_barrier()
        _store(first_state, row, at, live, mask, first, FIRST)
        _store(second_state, row, at, live, mask, second, SECOND)
        tl.store(weights + at, narrow, mask=mask)


@triton.jit
def _load(state, row, at, live, mask, g, SHAPE: tl.constexpr):
    """Of these rows; SHAPE is that of `optim`, or "" where there is none."""
    if SHAPE == "element":
        held = tl.load(state + at, mask=mask, other=0.0)
    elif SHAPE == "row":
        held = tl.load(state + row, mask=live, other=0.0)
    else:
        held = g
    return held


@triton.jit
def _store(state, row, at, live, mask, held, SHAPE: tl.constexpr):
    if SHAPE == "element":
        tl.store(state + at, held, mask=mask)
    elif SHAPE == "row":
        tl.store(state + row, held, mask=live)
