"""Distinct rows and their summed gradients, for those who need them as tensors."""

import torch
import triton
import triton.language as tl

from shardembed.kernels.gradients import Gradients
from shardembed.kernels.triton.order import Order
from shardembed.kernels.triton.sums import Runs, sum_of_runs
from shardembed.kernels.triton.tiles import Tile, launch


def merge(waiting: Gradients, order: Order) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.merge`: distinct rows `[U]`, ascending, and the sum of the gradients of each, `[U, W]`."""
    distinct = int(order.count)  # host sync on a GPU: the result has so many rows
    width = waiting.grads_SW.shape[1]
    out = waiting.grads_SW.new_empty(distinct, width)
    rows_U = order.rows_E[order.starts[:distinct]].to(torch.int64)
    if not distinct:
        return rows_U, out
    tile = Tile.of(width)
    runs = Runs.of(waiting.grads_SW, order, tile)
    pieces = order.pieces is not None
    launch(_merge, tile.programs(distinct), out, *runs.arguments, WIDTH=width, PIECES=pieces, **tile.constants)
    return rows_U, out


@triton.jit
def _merge(
    out,
    grads,
    partials,
    rows_E,
    segments_E,
    starts,
    piece_starts,
    count,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
    PIECES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    live = run < tl.load(count)
    columns = tl.arange(0, COLUMNS)
    wanted = columns < WIDTH
    total = sum_of_runs(grads, partials, segments_E, starts, piece_starts, run, live, wanted, WIDTH, COLUMNS, MANY, PIECES, AHEAD)
    tl.store(out + run[:, None] * WIDTH + columns[None, :], total, mask=live[:, None] & wanted[None, :])
