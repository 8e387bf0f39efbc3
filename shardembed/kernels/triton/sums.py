"""The sum of each run's gradients, in the order of arrival, and the partial sums that long runs need first."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shardembed.kernels.triton.order import Order
from shardembed.kernels.triton.tiles import Tile, add_vectors, launch


@dataclass(frozen=True)
class Runs:
    """What `sum_of_runs` reads.

    Attributes:
        grads_SW: one gradient a segment.
        partials: the sums of the pieces of long runs.
        order: which segments each row gets.
    """

    grads_SW: torch.Tensor
    partials: torch.Tensor
    order: Order

    @staticmethod
    def of(grads_SW: torch.Tensor, order: Order, tile: Tile) -> "Runs":
        """Sums the pieces of long runs."""
        grads_SW, pieces = grads_SW.contiguous(), order.pieces
        if pieces is None:
            return Runs(grads_SW, grads_SW, order)
        width = grads_SW.shape[1]
        partials = grads_SW.new_empty(pieces.begins.numel(), width)
        launch(
            _sum_pieces,
            tile.lasting_programs(len(partials), grads_SW.device),
            partials,
            grads_SW,
            order.segments_E,
            pieces.begins,
            pieces.ends,
            pieces.count,
            WIDTH=width,
            **tile.constants,
        )
        return Runs(grads_SW, partials, order)

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """As kernels take them: grads, partials, rows_E, segments_E, starts, piece_starts, count."""
        order = self.order
        piece_starts = order.starts if order.pieces is None else order.pieces.starts
        return self.grads_SW, self.partials, order.rows_E, order.segments_E, order.starts, piece_starts, order.count


@triton.jit
def _sum_pieces(
    partials,
    grads,
    segments_E,
    begins,
    ends,
    count,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
    AHEAD: tl.constexpr,
):
    pieces = tl.load(count)
    columns = tl.arange(0, COLUMNS)
    wanted = columns < WIDTH
    for tile in range(tl.program_id(0), tl.cdiv(pieces, MANY), tl.num_programs(0)):
        piece = tile * MANY + tl.arange(0, MANY).to(tl.int64)
        live = piece < pieces
        first = tl.load(begins + piece, mask=live, other=0).to(tl.int64)
        length = (tl.load(ends + piece, mask=live, other=0) - first).to(tl.int32)
        total = tl.zeros([MANY, COLUMNS], dtype=partials.dtype.element_ty)
        total = add_vectors(total, grads, segments_E, grads, first, length, wanted, WIDTH, True, False, AHEAD)
        tl.store(partials + piece[:, None] * WIDTH + columns[None, :], total, mask=live[:, None] & wanted[None, :])


@triton.jit
def sum_of_runs(
    grads,
    partials,
    segments_E,
    starts,
    piece_starts,
    run,
    live,
    wanted,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
    PIECES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """The summed gradients `[MANY, COLUMNS]` of the runs with these numbers."""
    first = tl.load(starts + run, mask=live, other=0).to(tl.int64)
    length = (tl.load(starts + run + 1, mask=live, other=0) - first).to(tl.int32)
    total = tl.zeros([MANY, COLUMNS], dtype=grads.dtype.element_ty)
    if PIECES:
        piece = tl.load(piece_starts + run, mask=live, other=0).to(tl.int64)
        pieces = (tl.load(piece_starts + run + 1, mask=live, other=0) - piece).to(tl.int32)
        length = tl.where(pieces > 0, 0, length)
        total = add_vectors(total, partials, segments_E, grads, piece, pieces, wanted, WIDTH, False, False, AHEAD)
    return add_vectors(total, grads, segments_E, grads, first, length, wanted, WIDTH, True, False, AHEAD)
