"""Stage 10's two exchanges, each made only where a plan needs it: copies share gradients, cut rows share their statistic.

Copies are reduced in one of two ways, and every rank takes the same, from counts that all of them know:

    whole   the tables as they are, with a column of touches, in one all-reduce
    rows    the touched rows of each rank to every other, in one all-to-all; each row's sum is made in the order of ranks

Legend: P what a row is sent as (its number, its values), R ranks, S slabs, T rows of all ranks, U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shardembed.comm.comm import Comm
from shardembed.comm.sharing import share
from shardembed.comm.tag import TAG
from shardembed.kernels.cpu import square_sums
from shardembed.kernels.gradients import Gradients
from shardembed.store.slab import Slab
from shardembed.store.twins import RowParts, Stretch, combine_rows, total, tree_total
from shardembed.wire.message import Numbers

Rows = tuple[torch.Tensor, torch.Tensor]  # distinct rows [U], ascending, and a number an element [U, W]
COUNTED = 1 << 18  # bytes of copies from which ranks ask each other for their counts; less is reduced whole before they had answers


def reduce_copies(slabs: Sequence[Slab], comm: Comm, collection: int) -> None:
    """Give every copy the gradients of all ranks, for all copied slabs together.

    All ranks get the same bits and then make the same update, so copies stay bit-identical.
    """
    copied = [slab for slab in slabs if slab.spec.copied and not slab.spec.policy.frozen]
    dtype = torch.float64 if any(slab.spec.compute_dtype == torch.float64 for slab in copied) else torch.float32
    summed = sum_over_ranks(copied, [slab.merged() for slab in copied], dtype, "step: reduce copies", comm, collection)
    for slab, (rows_U, grads_UW) in zip(copied, summed, strict=True):
        slab.replace(rows_U, grads_UW.to(slab.spec.compute_dtype))


def sum_over_ranks(
    slabs: Sequence[Slab], rows: Sequence[Rows], dtype: torch.dtype, stage: str, comm: Comm, collection: int
) -> list[Rows]:
    """The rows that any rank has, and their sums over the ranks, in `dtype`, for slabs that every rank holds. One all-reduce, none
    without slabs; or, where these are large (`COUNTED`), an all-to-all of counts, and then one all-reduce or all-to-all.
    """
    if not slabs:
        return []
    if picture_elements(slabs) * dtype.itemsize >= COUNTED:
        mine = [rows_U.numel() for rows_U, _ in rows]
        counts_RS = share(comm, f"{stage}, counts", mine, collection, slabs[0].weights.device)
        if rows_elements(slabs, counts_RS, dtype) < picture_elements(slabs):
            return _sum_rows(slabs, rows, counts_RS, dtype, stage, comm, collection)
    return _sum_whole(slabs, rows, dtype, stage, comm, collection)


def picture_elements(slabs: Sequence[Slab]) -> int:
    """Numbers that are reduced where copies are reduced whole."""
    return sum(slab.weights.shape[0] * (slab.spec.width + 1) for slab in slabs)


def rows_elements(slabs: Sequence[Slab], counts_RS: Numbers, dtype: torch.dtype) -> int:
    """Numbers that a rank puts together where rows travel, of so many rows by rank and slab `[R, slabs]`: as if all ranks had what
    the fullest one has. That one copies its rows for each other rank, which may be far more than what comes.

    An all-reduce moves each number twice, so by what travels rows could be up to twice as many; but they are sorted, too.
    """
    return int((counts_RS @ _row_elements(slabs, dtype).sum(1)).max()) * len(counts_RS)


def _sum_whole(
    slabs: Sequence[Slab], rows: Sequence[Rows], dtype: torch.dtype, stage: str, comm: Comm, collection: int
) -> list[Rows]:
    sizes = [slab.weights.shape[0] * (slab.spec.width + 1) for slab in slabs]
    # A picture of the whole tables with a column of touches. At the end is room for what `Comm` tags each all-reduce with.
    buffer = torch.zeros(sum(sizes) + TAG, dtype=dtype, device=slabs[0].weights.device)
    dense = [part.view(-1, slab.spec.width + 1) for slab, part in zip(slabs, buffer[:-TAG].split(sizes), strict=True)]
    for sums, (rows_U, values_UW) in zip(dense, rows, strict=True):
        sums[rows_U, :-1] = values_UW.to(dtype)
        # Touched, also where gradients cancel: moments of Adam decay all the same.
        sums[rows_U, -1] = 1
    comm.all_reduce_tables(stage, buffer, collection)
    touched = [sums[:, -1].nonzero().squeeze(1) for sums in dense]  # host sync on a GPU
    return [(rows_U, sums[rows_U, :-1]) for sums, rows_U in zip(dense, touched, strict=True)]


def _sum_rows(
    slabs: Sequence[Slab],
    rows: Sequence[Rows],
    counts_RS: Numbers,
    dtype: torch.dtype,
    stage: str,
    comm: Comm,
    collection: int,
) -> list[Rows]:
    here, ranks = comm.rank, comm.world_size
    keys = [rows_U.to(_key_dtype(slab, dtype)) for slab, (rows_U, _) in zip(slabs, rows, strict=True)]
    values = [values_UW.to(dtype).contiguous() for _, values_UW in rows]
    # Numbers of rows go as bits among the others: nobody calculates with a message.
    mine = torch.cat([part.view(dtype).view(-1) for pair in zip(keys, values, strict=True) for part in pair])
    sizes_RSP = counts_RS[:, :, None] * _row_elements(slabs, dtype)
    received = sizes_RSP.sum((1, 2)).tolist()
    assert received[here] == mine.numel()
    sent, before = [mine.numel()] * ranks, sum(received[:here])
    sent[here] = received[here] = 0
    arrived = comm.all_to_all("step", stage, mine.repeat(ranks - 1), sent, received, collection)
    pieces = torch.cat([arrived[:before], mine, arrived[before:]]).split(sizes_RSP.reshape(-1).tolist())
    found, step = [], 2 * len(slabs)
    for number, slab in enumerate(slabs):
        rows_T = torch.cat(pieces[2 * number :: step]).view(_key_dtype(slab, dtype)).to(torch.int64)
        values_TW = torch.cat(pieces[2 * number + 1 :: step]).view(-1, slab.spec.width)
        found.append(_merged(slab, rows_T, values_TW))
    return found


def _merged(slab: Slab, rows_T: torch.Tensor, values_TW: torch.Tensor) -> Rows:
    """Distinct rows and their sums. Entries stand in the order of ranks, and so do sums of floats."""
    if values_TW.dtype.is_floating_point:
        return slab.kernel.merge(Gradients(rows_T, None, values_TW), None)
    rows_U, inverse = torch.unique(rows_T, return_inverse=True)
    return rows_U, values_TW.new_zeros(rows_U.numel(), slab.spec.width).index_add_(0, inverse, values_TW)


def _key_dtype(slab: Slab, dtype: torch.dtype) -> torch.dtype:
    """What rows are numbered in, in a message of `dtype`: as wide as it, or twice as wide."""
    return slab.spec.key_dtype if dtype.itemsize == 4 else torch.int64


def _row_elements(slabs: Sequence[Slab], dtype: torch.dtype) -> Numbers:
    """Numbers that a row's own number takes in a message of `dtype`, and those of its values, `[slabs, 2]`."""
    return np.array([[_key_dtype(slab, dtype).itemsize // dtype.itemsize, slab.spec.width] for slab in slabs], dtype=np.int64)


def mean_squares(
    slabs: Sequence[Slab], stretches: Sequence[Stretch], comm: Comm, deterministic: bool, collection: int
) -> dict[int, torch.Tensor]:
    """The mean of g^2 over whole rows, `[U]` by slab index: where the optimizer needs it and rows are split, and in deterministic
    mode wherever the optimizer needs it.
    """
    rowwise = [slab for slab in slabs if slab.spec.optimizer.rowwise and not slab.spec.policy.frozen]
    wanted = {slab.spec.index: slab for slab in rowwise if slab.spec.split_rows or deterministic}
    found: dict[int, RowParts] = {}
    orders: dict[int, torch.Tensor] = {}
    for index, slab in wanted.items():
        rows_U, grads_UW = slab.merged()
        # In deterministic mode one number an element, since a sum here would depend on where columns are cut.
        squares = grads_UW.to(torch.float64).square() if deterministic else square_sums(grads_UW)
        if slab.dynamic is not None and slab.spec.split_rows:  # twins number their rows each in their own way
            rows_U, orders[index] = slab.dynamic.in_order(rows_U)
            squares = squares[orders[index]]
        found[index] = RowParts(rows_U, squares)
    how = tree_total if deterministic else total
    split = {index: found[index] for index, slab in wanted.items() if slab.spec.split_rows}
    sums = {index: how([parts.parts]) for index, parts in found.items() if index not in split}
    if split:
        ways = dict.fromkeys(split, how)
        sums.update(combine_rows(stretches, split, ways, comm, "step", "step: share row squares", collection))
    for index, order in orders.items():
        sums[index] = torch.empty_like(sums[index]).index_copy_(0, order, sums[index])
    columns = {index: slab.columns_of(found[index].rows_U) for index, slab in wanted.items()}
    return {index: (part / columns[index]).to(wanted[index].spec.compute_dtype) for index, part in sums.items()}
