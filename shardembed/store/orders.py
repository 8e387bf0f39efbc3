"""The order of the rows that lookups ask for, found out before their gradients come, on a GPU for all slabs at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from shardembed.store.slab import Slab

if TYPE_CHECKING:  # since Triton may be absent
    from shardembed.kernels.triton.order import Order


def orders(slabs: Sequence[Slab], asked: Sequence[tuple[torch.Tensor, torch.Tensor | None]]) -> list[Order | None]:
    """What the steps of these lookups, rows and offsets a slab, need to know of them, found out before their gradients come and for
    all slabs together; None where a step cannot use it.
    """
    wanted = [slab.to_order(*part) for slab, part in zip(slabs, asked, strict=True)]
    numbers = [number for number, part in enumerate(wanted) if part is not None]
    found: list[Order | None] = [None] * len(slabs)
    if numbers:
        from shardembed.kernels.triton import order

        pairs = ((wanted[number], slabs[number].weights.shape) for number in numbers)
        asked_for = [order.Asked(part.rows_E, part.offsets, rows, order.direct_of(width)) for part, (rows, width) in pairs if part]
        made = order.orders(asked_for)
        for number, one in zip(numbers, made, strict=True):
            found[number] = one
    return found
