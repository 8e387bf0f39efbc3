"""What a rank's shards of a table are to `torch.distributed.checkpoint`, which knows boxes (offsets and sizes) and nothing else.

Blocks of rows are boxes where they lie. Rows that are dealt out are none: to be saved, those of a strip are exchanged for
contiguous blocks, as many rows a rank as it holds; to be loaded, a strip is one box as high as the table, of which its own rows
are kept. So a checkpoint has a box a rank and strip under every plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shardembed.comm.comm import Comm
from shardembed.errors import UnsupportedError
from shardembed.tables.layout import Layout, Shard, Strip, meeting

WINDOW = 16 << 20  # bytes that a rank gets at once while rows are exchanged


@dataclass(frozen=True)
class Held:
    """A shard that this rank holds.

    Attributes:
        shard: what of the table it is.
        weights: its rows, `[rows, columns]`, in the slab's memory.
        first: of several copies, this is the one that is saved.
    """

    shard: Shard
    weights: torch.Tensor
    first: bool


@dataclass(frozen=True)
class Owners:
    """Who holds a table.

    Attributes:
        layout: of the table.
        comm: the ranks of the layout.
        device: on which these talk.
    """

    layout: Layout
    comm: Comm
    device: torch.device


@dataclass(frozen=True)
class Box:
    """A part of the table.

    Attributes:
        offsets: its first row and column.
        tensor: of its size, to be saved or to be loaded into.
        first: of several copies, this is the one that is saved.
    """

    offsets: torch.Size
    tensor: torch.Tensor
    first: bool


def to_save(held: Sequence[Held], owners: Owners, dtype: torch.dtype) -> list[Box]:
    """What this rank writes. Collective where rows are dealt out, and takes as much host memory as this rank has of these."""
    boxes: list[Box] = []
    for strip in owners.layout.strips:
        own = [one for one in held if one.shard.columns == strip.columns]
        if strip.stride == 1:
            boxes += [_as_it_lies(one) for one in own]
            continue
        first, rows = _in_blocks(strip, own, owners, dtype)
        if len(rows):
            boxes.append(Box(torch.Size((first, strip.columns.start)), rows, True))
    return boxes


def to_load(held: Sequence[Held], layout: Layout) -> list[Box]:
    """What this rank asks for."""
    boxes: list[Box] = []
    for strip in layout.strips:
        own = [one for one in held if one.shard.columns == strip.columns]
        if strip.stride == 1:
            boxes += [_as_it_lies(one) for one in own]
        elif own:
            parts = tuple((one.shard.rows, one.weights.detach()) for one in own)
            rows = OwnRows.of(parts, range(layout.num_embeddings))
            boxes.append(Box(torch.Size((0, strip.columns.start)), rows, True))
    return boxes


def _as_it_lies(one: Held) -> Box:
    return Box(torch.Size((one.shard.rows.start, one.shard.columns.start)), one.weights, one.first)


@torch.no_grad()
def _in_blocks(strip: Strip, own: Sequence[Held], owners: Owners, dtype: torch.dtype) -> tuple[int, torch.Tensor]:
    """A contiguous block of a strip whose rows are dealt out: its first row, and `[rows, columns]` on the host."""
    comm, width = owners.comm.side(), len(strip.columns)
    of_rank: list[list[range]] = [[] for _ in range(comm.world_size)]
    for block in strip.blocks:
        of_rank[block.ranks[0]].append(block.rows)
    edges = [0, *itertools.accumulate(sum(map(len, rows)) for rows in of_rank)]
    first, stop = edges[comm.rank], edges[comm.rank + 1]
    found = torch.empty(stop - first, width, dtype=dtype)
    step = max(1, WINDOW // (width * dtype.itemsize))
    for passed in range(0, max(high - low for low, high in itertools.pairwise(edges)), step):
        windows = [(low + passed, min(low + passed + step, high)) for low, high in itertools.pairwise(edges)]
        parts, sent = [], []
        for low, high in windows:
            met = [(one.weights, meeting(one.shard.rows, low, high)) for one in own]
            chosen = [weights[where[1]] for weights, where in met if where is not None]
            sent.append(sum(map(len, chosen)) * width * dtype.itemsize)
            parts += chosen
        low, high = windows[comm.rank]
        coming = [[where[0] for rows in each if (where := meeting(rows, low, high)) is not None] for each in of_rank]
        sizes = [[len(range(*place.indices(high - low))) for place in each] for each in coming]
        flat = torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0, dtype=dtype)
        received = comm.all_to_all(
            "control",
            "save rows that are dealt out",
            flat.to(owners.device).view(torch.uint8),
            sent,
            [sum(each) * width * dtype.itemsize for each in sizes],
        )
        pieces = received.view(dtype).view(-1, width).split(list(itertools.chain(*sizes)))
        window = found[low - first : max(low, high) - first]
        for place, piece in zip(itertools.chain(*coming), pieces, strict=True):
            window[place] = piece.to(found.device)
    return first, found


class OwnRows(torch.Tensor):
    """Rows of a table, of which those that lie here are kept: it can be narrowed and written, and nothing else."""

    rows: range
    parts: tuple[tuple[range, torch.Tensor], ...]

    @staticmethod
    def of(parts: tuple[tuple[range, torch.Tensor], ...], rows: range) -> OwnRows:
        """
        Args:
            parts: which rows of the table lie here, and the tensors that hold them, all of one width.
            rows: contiguous ones, which this stands for.
        """
        kept = parts[0][1]
        made = torch.Tensor._make_wrapper_subclass(OwnRows, (len(rows), kept.shape[1]), dtype=kept.dtype, device=kept.device)
        made.rows, made.parts = rows, parts
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mine = args[0]
        if func is torch.ops.aten.detach.default:
            return OwnRows.of(mine.parts, mine.rows)
        if func is torch.ops.aten.slice.Tensor and isinstance(mine, OwnRows):
            dim, start, stop = args[1:4]
            if dim == 0:
                return OwnRows.of(mine.parts, mine.rows[start:stop])
            return OwnRows.of(tuple((rows, kept[:, start:stop]) for rows, kept in mine.parts), mine.rows)
        if func is torch.ops.aten.copy_.default and isinstance(mine, OwnRows):
            for rows, kept in mine.parts:
                if met := meeting(rows, mine.rows.start, mine.rows.stop):
                    kept[met[1]] = args[1][met[0]].to(kept.device, kept.dtype)
            return mine
        raise UnsupportedError(f"{func.name()}: rows of a table that is dealt out can be loaded into, and nothing else")
