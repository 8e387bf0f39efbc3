"""The layout of messages: tensors of every slab in one buffer of bytes, grouped by the rank they go to.

    buffer = | to rank 0: part 0, part 1, ... | to rank 1: part 0, part 1, ... | ...

Each part's block starts at a multiple of 16 bytes, so that every dtype can be viewed in place. Both sides know how many items
each block has (from the counts message), so nothing else is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

ALIGNMENT = 16


@dataclass(frozen=True)
class Part:
    """One tensor of a message: `counts[r]` items go to (or come from) rank r; an item has `item_shape` and travels as
    `dtype`.
    """

    counts: Sequence[int]
    dtype: torch.dtype
    item_shape: tuple[int, ...] = ()

    def block_bytes(self, rank: int) -> int:
        """Bytes of the block for one rank, padding included."""
        size = self.counts[rank] * prod(self.item_shape) * self.dtype.itemsize
        return -(-size // ALIGNMENT) * ALIGNMENT

    @property
    def items(self) -> int:
        return sum(self.counts)


def message_bytes(parts: Sequence[Part], world_size: int) -> list[int]:
    """Bytes of the message for (or from) each rank."""
    return [sum(part.block_bytes(rank) for part in parts) for rank in range(world_size)]


def pack(tensors: Sequence[torch.Tensor], parts: Sequence[Part], world_size: int) -> torch.Tensor:
    """One byte buffer from `tensors`, each `[items, *item_shape]` with its items in the order of the ranks they go to.

    Values are cast to each part's dtype on the way; what overflows a float16 or bfloat16 wire becomes inf.
    """
    if len(parts) == 1 and tensors[0].dtype == parts[0].dtype and _dense(parts[0], world_size):
        return tensors[0].contiguous().view(-1).view(torch.uint8)
    buffer = torch.empty(sum(message_bytes(parts, world_size)), dtype=torch.uint8, device=tensors[0].device)
    for target, (part, start, count) in zip(_views(buffer, parts, world_size), _items(parts, world_size), strict=True):
        target.copy_(tensors[part][start : start + count])
    return buffer


def unpack(buffer: torch.Tensor, parts: Sequence[Part], world_size: int) -> list[torch.Tensor]:
    """The tensors of a received buffer, each `[items, *item_shape]` in the order of the ranks they came from.

    A lone part without padding is a view of the buffer; others are copied together.
    """
    if len(parts) == 1 and _dense(parts[0], world_size):
        return [buffer.view(parts[0].dtype).view(parts[0].items, *parts[0].item_shape)]
    blocks: list[list[torch.Tensor]] = [[] for _ in parts]
    for view, (part, _, _) in zip(_views(buffer, parts, world_size), _items(parts, world_size), strict=True):
        blocks[part].append(view)
    return [_joined(views, part, buffer) for views, part in zip(blocks, parts, strict=True)]


def _joined(views: list[torch.Tensor], part: Part, buffer: torch.Tensor) -> torch.Tensor:
    if len(views) == 1:
        return views[0]
    if not views:
        return torch.empty((0, *part.item_shape), dtype=part.dtype, device=buffer.device)
    return torch.cat(views)


def _dense(part: Part, world_size: int) -> bool:
    """No block but the last needs padding, and it neither."""
    size = prod(part.item_shape) * part.dtype.itemsize
    return all(part.counts[rank] * size % ALIGNMENT == 0 for rank in range(world_size))


def _items(parts: Sequence[Part], world_size: int) -> list[tuple[int, int, int]]:
    """(part, first item, items) of every block that is not empty, in the order of the buffer."""
    starts = [0] * len(parts)
    blocks = []
    for rank in range(world_size):
        for index, part in enumerate(parts):
            if part.counts[rank]:
                blocks.append((index, starts[index], part.counts[rank]))
            starts[index] += part.counts[rank]
    return blocks


def _views(buffer: torch.Tensor, parts: Sequence[Part], world_size: int) -> list[torch.Tensor]:
    """Every block that is not empty as a tensor `[count, *item_shape]` over the buffer's bytes, in the order of the buffer."""
    views, position = [], 0
    for rank in range(world_size):
        for part in parts:
            size = part.counts[rank] * prod(part.item_shape) * part.dtype.itemsize
            if part.counts[rank]:
                views.append(buffer[position : position + size].view(part.dtype).view(part.counts[rank], *part.item_shape))
            position += part.block_bytes(rank)
    return views
