"""Tensors into a message, and out of one: all parts and ranks at once. On a CPU by one compiled call where Numba is installed,
elsewhere by index arithmetic in plain torch; both move the same bytes.

Legend: P parts, R ranks, U units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from shardembed.kernels.grouping import compiled
from shardembed.wire.message import MessageLayout, Numbers, aligned

UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what plain torch moves, by its bytes


def pack(tensors: Sequence[torch.Tensor], layout: MessageLayout) -> torch.Tensor:
    """One message, uint8 `[sum of rank_bytes]`; padding is whatever was there.

    Args:
        tensors: of each part, in its dtype, `[items, *item_shape]`.
    """
    if layout.dense:
        return _bytes(tensors[0])
    buffer = torch.empty(int(layout.rank_bytes.sum()), dtype=torch.uint8, device=tensors[0].device)
    if (kernels := compiled(buffer.device)) is not None:
        kept = [tensor.contiguous() for tensor in tensors]  # addresses keep nothing alive
        kernels.packing.pack(*_addressed(kept, layout), buffer.data_ptr())
    else:
        sizes = layout.tensor_bytes
        unit, there_U, here_U = _places(layout, sizes, buffer.device)
        buffer.view(unit)[there_U] = torch.cat([_bytes(tensor) for tensor in tensors]).view(unit)[here_U]
    return buffer


def unpack(buffer: torch.Tensor, layout: MessageLayout) -> list[torch.Tensor]:
    """The tensors of a message that came, `[items, *item_shape]` each, in the order of the ranks they came from. A lone part
    without padding is a view of the buffer.
    """
    parts = layout.schema.parts
    if layout.dense:
        return [buffer.view(parts[0].dtype).view(-1, *parts[0].item_shape)]
    if (kernels := compiled(buffer.device)) is not None:
        found = [torch.empty(size, *part.item_shape, dtype=part.dtype) for part, size in zip(parts, layout.totals, strict=True)]
        _fill_implied(found, layout)
        kernels.packing.unpack(*_addressed(found, layout), buffer.data_ptr())
        return found
    sizes = aligned(layout.tensor_bytes)  # so that each can be viewed in place
    whole = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=buffer.device)
    shares = zip(whole.split(sizes.tolist()), layout.tensor_bytes.tolist(), parts, strict=True)
    found = [share[:size].view(part.dtype).view(-1, *part.item_shape) for share, size, part in shares]
    _fill_implied(found, layout)
    unit, there_U, here_U = _places(layout, sizes, buffer.device)
    whole.view(unit)[here_U] = buffer.view(unit)[there_U]
    return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _fill_implied(tensors: Sequence[torch.Tensor], layout: MessageLayout) -> None:
    for number in layout.schema.implying:
        tensors[number].fill_(layout.schema.parts[number].implied or 0)


def _addressed(tensors: Sequence[torch.Tensor], layout: MessageLayout) -> tuple[Numbers, ...]:
    addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    return addresses, layout.items, layout.counts, layout.schema.item_bytes


def _places(layout: MessageLayout, sizes: Numbers, device: torch.device) -> tuple[torch.dtype, torch.Tensor, torch.Tensor]:
    """(the largest unit that everything is a multiple of, where each unit that travels is in the message, and where in the tensors,
    which stand one after the other in `sizes` bytes), int64 `[U]`.
    """
    item_bytes = layout.schema.item_bytes
    unit = int(np.gcd.reduce(item_bytes, initial=max(UNITS)))
    travel = layout.sizes.T.reshape(-1)  # in the order of the message
    there = _before(aligned(travel))
    here = (_before(layout.items * item_bytes[:, None], axis=1) + _before(sizes)[:, None]).T.reshape(-1)
    units = np.stack([travel, there, here]) // unit
    units[1:] -= _before(units[0])
    travels, to, origin = torch.from_numpy(units).to(device)
    count = int(units[0].sum())
    number_U = torch.arange(count, device=device)
    # Sizes are known on the host, so nothing waits for a GPU.
    there_U, here_U = (torch.repeat_interleave(shift, travels, output_size=count) + number_U for shift in (to, origin))
    return UNITS[unit], there_U, here_U


def _before(numbers: Numbers, axis: int = 0) -> Numbers:
    """The sum of those before each."""
    return np.cumsum(numbers, axis) - numbers
