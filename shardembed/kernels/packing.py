"""Tensors into a message, and out of one: all parts and ranks at once. By one compiled call, on a CPU where Numba is installed and
on a GPU where Triton is; elsewhere by index arithmetic in plain torch. All move the same bytes. Rows that
travel as they lie in a table need not be gathered before: the call for a CPU reads them there.

Legend: P parts, R ranks, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shardembed.kernels import triton
from shardembed.kernels.grouping import compiled
from shardembed.kernels.host import to_device
from shardembed.kernels.kernel import Rows, Source, gathered
from shardembed.wire.message import MessageLayout, Numbers, aligned

UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what plain torch moves, by its bytes


def pack(sources: Sequence[Source], layout: MessageLayout) -> torch.Tensor:
    """One message, uint8 `[sum of rank_bytes]`; padding is whatever was there.

    Args:
        sources: of each part, in its dtype, `[items, *item_shape]`, or rows of a matrix that are to be that.

    Raises:
        IndexError: a matrix has no such row.
    """
    if layout.dense:
        return _bytes(gathered(sources[0]))
    device = (sources[0].weights if isinstance(sources[0], Rows) else sources[0]).device
    buffer = torch.empty(int(layout.rank_bytes.sum()), dtype=torch.uint8, device=device)
    if (kernels := compiled(device)) is not None:
        _pack_compiled(kernels.packing, sources, layout, buffer)
        return buffer
    tensors = [gathered(source) for source in sources]
    if triton.serves(buffer.device):
        from shardembed.kernels.triton.packing import move

        kept = [tensor.contiguous() for tensor in tensors]
        move(kept, layout, buffer, pack=True)
    else:
        sizes = layout.tensor_bytes
        unit, there_U, here_U = _places(layout, sizes, buffer.device)
        buffer.view(unit)[there_U] = torch.cat([_bytes(tensor) for tensor in tensors]).view(unit)[here_U]
    return buffer


def _pack_compiled(packing: Any, sources: Sequence[Source], layout: MessageLayout, buffer: torch.Tensor) -> None:
    # Addresses keep nothing alive.
    kept = [(source.weights if isinstance(source, Rows) else source).contiguous() for source in sources]
    rows = {part: source.rows_E.contiguous() for part, source in enumerate(sources) if isinstance(source, Rows)}
    if not rows:
        packing.pack(*_addressed(kept, layout), buffer.data_ptr())
        return
    picked = np.zeros((3, len(sources)), dtype=np.int64)
    for part, rows_E in rows.items():
        first = rows_E.data_ptr()
        picked[:, part] = first, first + rows_E.numel() * rows_E.itemsize, kept[part].shape[0]
    if not packing.gather(*_addressed(kept, layout), *picked, buffer.data_ptr()):
        raise IndexError("a request names a row that the slab does not have")


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
    sizes, whole, found = _room(layout, buffer.device)
    if triton.serves(buffer.device):
        from shardembed.kernels.triton.packing import move

        move(found, layout, buffer, pack=False)
        return found
    unit, there_U, here_U = _places(layout, sizes, buffer.device)
    whole.view(unit)[here_U] = buffer.view(unit)[there_U]
    return found


def _room(layout: MessageLayout, device: torch.device) -> tuple[Numbers, torch.Tensor, list[torch.Tensor]]:
    """(bytes of each part, memory for all of them, and each in it as it is to be); what is implied is there already."""
    parts = layout.schema.parts
    sizes = aligned(layout.tensor_bytes)  # so that each can be viewed in place
    whole = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
    shares = zip(whole.split(sizes.tolist()), layout.tensor_bytes.tolist(), parts, strict=True)
    found = [share[:size].view(part.dtype).view(-1, *part.item_shape) for share, size, part in shares]
    _fill_room(layout, sizes, whole, found)
    return sizes, whole, found


def _fill_room(layout: MessageLayout, sizes: Numbers, whole: torch.Tensor, found: Sequence[torch.Tensor]) -> None:
    """As `_fill_implied`, by one fill where the parts are of one kind and stand side by side."""
    numbers = layout.schema.implying
    kinds = {layout.schema.parts[number] for number in numbers}
    if len(kinds) != 1 or numbers[-1] - numbers[0] != len(numbers) - 1:
        _fill_implied(found, layout)
        return
    (kind,) = kinds
    ends = np.cumsum(sizes)
    room = whole[int(ends[numbers[0]] - sizes[numbers[0]]) : int(ends[numbers[-1]])].view(kind.dtype)
    if room.numel():
        room.fill_(kind.implied or 0)


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
    travels, to, origin = to_device(units, device)
    count = int(units[0].sum())
    number_U = torch.arange(count, device=device)
    # Sizes are known on the host, so nothing waits for a GPU.
    there_U, here_U = (torch.repeat_interleave(shift, travels, output_size=count) + number_U for shift in (to, origin))
    return UNITS[unit], there_U, here_U


def _before(numbers: Numbers, axis: int = 0) -> Numbers:
    """The sum of those before each."""
    return np.cumsum(numbers, axis) - numbers
