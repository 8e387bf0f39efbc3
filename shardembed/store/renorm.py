"""max_norm: before a lookup, rows that are too long are scaled in place, each distinct row of the global batch once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shardembed.comm.comm import Comm
from shardembed.kernels import reference
from shardembed.store.request import Request
from shardembed.store.slab import Slab
from shardembed.store.twins import Combine, RowParts, Stretch, combine_rows, largest, total, tree_total


def renormalise(
    slabs: Sequence[Slab],
    stretches: Sequence[Stretch],
    rows: Sequence[torch.Tensor],
    request: Request,
    comm: Comm,
    deterministic: bool,
) -> None:
    """Bring the rows that all ranks ask for to their table's max_norm. Collective where columns of such a table are cut.

    rows: of the keys of each slab, `[E]`.
    """
    wanted = {slab.spec.index: slab for slab in slabs if slab.spec.policy.max_norm is not None}
    if not wanted:
        return
    found: dict[int, RowParts] = {}
    how: dict[int, Combine] = {}
    for index, slab in wanted.items():
        found[index], how[index] = _parts(slab, torch.unique(rows[index]), deterministic)  # host sync on a GPU
    split = {index: found[index] for index, slab in wanted.items() if slab.spec.split_rows}
    sums = {index: how[index]([parts.parts]) for index, parts in found.items() if index not in split}
    if split:
        # As in `messages.send_back`: announced on the group "forward", or going where sizes follow from the call.
        group, number = ("backward", request.call) if request.ahead else ("forward", 0)
        sums.update(combine_rows(stretches, split, how, comm, group, "forward: share row norms", number))
    for index, slab in wanted.items():
        _scale(slab, found[index].rows_U, sums[index])


def renormalise_alone(slab: Slab, rows_U: torch.Tensor, deterministic: bool) -> None:
    """The same for these rows of a slab that has them whole."""
    parts, how = _parts(slab, rows_U, deterministic)
    _scale(slab, rows_U, how([parts.parts]))


def _parts(slab: Slab, rows_U: torch.Tensor, deterministic: bool) -> tuple[RowParts, Combine]:
    """What this slab adds to the norm of rows, and how such parts are put together."""
    powers_UW = reference.norm_powers(slab.weights, rows_U, slab.spec.policy.norm_type)
    if slab.spec.policy.norm_type == float("inf"):
        return RowParts(rows_U, powers_UW.amax(1)), largest
    if deterministic:
        return RowParts(rows_U, powers_UW), tree_total
    return RowParts(rows_U, powers_UW.sum(1)), total


def _scale(slab: Slab, rows_U: torch.Tensor, sums_U: torch.Tensor) -> None:
    policy = slab.spec.policy
    assert policy.max_norm is not None
    slab.touch(rows_U)
    reference.renormalise(slab.weights, rows_U, sums_U, policy.max_norm, policy.norm_type)
