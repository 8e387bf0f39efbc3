"""Gather and sum, fused: one program sums the rows of a tile of segments, in order, and writes each sum once."""

import torch
import triton
import triton.language as tl

from shardembed.kernels.triton.numbers import widen
from shardembed.kernels.triton.tiles import Tile, add_vectors, launch


def lookup(
    weights: torch.Tensor,
    rows_E: torch.Tensor,
    offsets: torch.Tensor | None,
    dtype: torch.dtype,
    scales_E: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.lookup`: the sum of each segment's rows, `[S, W]`, in `dtype`; the row itself, in the table's dtype, where
    every segment is a single row.

    Args:
        scales_E: multiplies each entry's row, in `dtype`; the result is then in `dtype` in either case.
    """
    assert weights.is_contiguous()
    segments = rows_E.numel() if offsets is None else offsets.numel() - 1
    width = weights.shape[1]
    single = offsets is None and scales_E is None
    out = torch.empty(segments, width, dtype=weights.dtype if single else dtype, device=weights.device)
    if not segments:
        return out
    tile = Tile.of(width)
    launch(
        _lookup,
        tile.programs(segments),
        out,
        weights,
        rows_E.contiguous(),
        rows_E if offsets is None else offsets.contiguous(),
        weights if scales_E is None else scales_E.contiguous(),
        segments,
        WIDTH=width,
        SEGMENTS=offsets is not None,
        SCALED=scales_E is not None,
        **tile.constants,
    )
    return out


@triton.jit(do_not_specialize=["segments"])
def _lookup(
    out,
    weights,
    rows_E,
    offsets,
    scales_E,
    segments,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    MANY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCALED: tl.constexpr,
    AHEAD: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64) * MANY + tl.arange(0, MANY)
    live = segment < segments
    columns = tl.arange(0, COLUMNS)
    wanted = columns < WIDTH
    mask = live[:, None] & wanted[None, :]
    if SEGMENTS:
        first = tl.load(offsets + segment, mask=live, other=0).to(tl.int64)
        count = (tl.load(offsets + segment + 1, mask=live, other=0) - first).to(tl.int32)
        total = tl.zeros([MANY, COLUMNS], dtype=out.dtype.element_ty)
        total = add_vectors(total, weights, rows_E, scales_E, first, count, wanted, WIDTH, True, SCALED, AHEAD)
    else:
        row = tl.load(rows_E + segment, mask=live, other=0).to(tl.int64)
        # In 64 bits: a table may have more than 2^31 elements.
        total = tl.load(weights + row[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        if SCALED:
            scale = widen(tl.load(scales_E + segment, mask=live, other=0.0), out.dtype.element_ty)
            total = widen(total, out.dtype.element_ty) * scale[:, None]
    tl.store(out + segment[:, None] * WIDTH + columns[None, :], total, mask=mask)
