"""Stage 10's two exchanges, each made only where a plan needs it: copies share gradients, cut rows share their statistic.

Legend: U distinct rows, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardembed.comm.comm import Comm
from shardembed.comm.tag import TAG
from shardembed.kernels.cpu import square_sums
from shardembed.store.slab import Slab
from shardembed.store.twins import RowParts, Stretch, combine_rows, total, tree_total

Rows = tuple[torch.Tensor, torch.Tensor]  # distinct rows [U], ascending, and a number an element [U, W]


def reduce_copies(slabs: Sequence[Slab], comm: Comm, collection: int) -> None:
    """Give every copy the gradients of all ranks: one all-reduce of sums and touch counts, for all copied slabs together.

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
    without slabs.
    """
    if not slabs:
        return []
    sizes = [slab.weights.shape[0] * (slab.spec.width + 1) for slab in slabs]
    # A picture of the whole tables with a column of touches: copies are small by plan, and ranks need not agree on sizes. At the
    # end is room for what `Comm` tags each all-reduce with.
    buffer = torch.zeros(sum(sizes) + TAG, dtype=dtype, device=slabs[0].weights.device)
    dense = [part.view(-1, slab.spec.width + 1) for slab, part in zip(slabs, buffer[:-TAG].split(sizes), strict=True)]
    for sums, (rows_U, values_UW) in zip(dense, rows, strict=True):
        sums[rows_U, :-1] = values_UW.to(dtype)
        # Touched, also where gradients cancel: moments of Adam decay all the same.
        sums[rows_U, -1] = 1
    comm.all_reduce_tables(stage, buffer, collection)
    touched = [sums[:, -1].nonzero().squeeze(1) for sums in dense]  # host sync on a GPU
    return [(rows_U, sums[rows_U, :-1]) for sums, rows_U in zip(dense, touched, strict=True)]


def mean_squares(
    slabs: Sequence[Slab], stretches: Sequence[Stretch], comm: Comm, deterministic: bool, collection: int
) -> dict[int, torch.Tensor]:
    """The mean of g^2 over whole rows, `[U]` by slab index: where the optimizer needs it and rows are split, and in deterministic
    mode wherever the optimizer needs it.
    """
    rowwise = [slab for slab in slabs if slab.spec.optimizer.rowwise and not slab.spec.policy.frozen]
    wanted = {slab.spec.index: slab for slab in rowwise if slab.spec.split_rows or deterministic}
    found: dict[int, RowParts] = {}
    for index, slab in wanted.items():
        rows_U, grads_UW = slab.merged()
        # In deterministic mode one number an element, since a sum here would depend on where columns are cut.
        squares = grads_UW.to(torch.float64).square() if deterministic else square_sums(grads_UW)
        found[index] = RowParts(rows_U, squares)
    how = tree_total if deterministic else total
    split = {index: found[index] for index, slab in wanted.items() if slab.spec.split_rows}
    sums = {index: how([parts.parts]) for index, parts in found.items() if index not in split}
    if split:
        ways = dict.fromkeys(split, how)
        sums.update(combine_rows(stretches, split, ways, comm, "step", "step: share row squares", collection))
    columns = {index: slab.columns_of(found[index].rows_U) for index, slab in wanted.items()}
    return {index: (part / columns[index]).to(wanted[index].spec.compute_dtype) for index, part in sums.items()}
