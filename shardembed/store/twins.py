"""Statistics of whole rows where columns lie on several ranks: one small exchange, made only where a plan needs it.

All strips of such a table are cut alike and are asked for the same ids, so the shards of one row block ("twins") see the same
distinct rows in the same order: they swap one partial result a row (in deterministic mode, one number an element), and nobody has
to say how many. One all-to-all serves all tables, and what lies side by side in all its strips is handled as one stretch. Every
twin combines the parts in strip order, so that all get the same bits.

Legend: U distinct rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from shardembed.comm.channels import Group
from shardembed.comm.comm import Comm
from shardembed.store.slab_spec import Block, SlabSpec

Combine = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class RowParts:
    """A slab's contribution to statistics of whole rows.

    Attributes:
        rows_U: distinct slab rows, int64 `[U]`, ascending.
        parts: of each row's statistic, float64: one number a row `[U]`, or one an element `[U, W]`.
    """

    rows_U: torch.Tensor
    parts: torch.Tensor


def total(parts: list[torch.Tensor]) -> torch.Tensor:
    """Add the strips' parts, each `[U]`, in strip order."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


def largest(parts: list[torch.Tensor]) -> torch.Tensor:
    """The largest of the strips' parts, each `[U]`."""
    return torch.stack(parts).amax(0)


def tree_total(parts: list[torch.Tensor]) -> torch.Tensor:
    """Add all elements of each row, `[U, W]` a strip, in an order that depends on the number of columns alone."""
    whole = torch.cat(parts, 1)
    while whole.shape[1] > 1:
        half = (whole.shape[1] + 1) // 2
        left, right = whole[:, :half], whole[:, half:]
        whole = torch.cat([left[:, : right.shape[1]] + right, left[:, right.shape[1] :]], 1)
    return whole.squeeze(1)


@dataclass(frozen=True)
class Strip:
    """Where one strip of a stretch lies.

    Attributes:
        index: of the slab.
        owner: the rank that holds it.
        first_key: the first of its slab rows.
        rows: how many these are.
        columns: how many the strip is wide.
    """

    index: int
    owner: int
    first_key: int
    rows: int
    columns: int

    def goes_on(self, after: Strip) -> bool:
        """These rows lie right behind those of `after`, in the same slab."""
        return self.columns == after.columns and self.first_key == after.first_key + after.rows

    def joined(self, on: Strip) -> Strip:
        """These rows, and those of `on` right behind them."""
        return replace(self, rows=self.rows + on.rows)


Stretch = tuple[Strip, ...]  # rows that lie together in each of their strips, in strip order; of several tables, where these do


def stretches_of(specs: Sequence[SlabSpec]) -> list[Stretch]:
    """All rows whose columns are split, the same on every rank."""
    blocks: dict[tuple[int, int], dict[int, tuple[int, Block]]] = defaultdict(dict)  # by table and row block: strip -> where
    for spec in specs:
        for lane in spec.lanes if spec.split_rows else ():
            for number, block in enumerate(lane.blocks):
                blocks[lane.table, number][lane.strip] = (spec.index, block)
    found: dict[tuple[tuple[int, int], ...], list[Stretch]] = defaultdict(list)  # by slab and owner of each strip
    # In row order, alike on every rank: parts travel in the order of stretches, and no message says which is which.
    for _, by_strip in sorted(blocks.items()):
        stretch = tuple(_strip(*by_strip[number]) for number in sorted(by_strip))
        alike = found[tuple((strip.index, strip.owner) for strip in stretch)]
        if alike and all(map(Strip.goes_on, stretch, alike[-1])):
            stretch = tuple(map(Strip.joined, alike.pop(), stretch))
        alike.append(stretch)
    return [stretch for alike in found.values() for stretch in alike]


def _strip(index: int, block: Block) -> Strip:
    shard = block.shard
    return Strip(index, shard.ranks[0], block.first_key, len(shard.rows), len(shard.columns))


def combine_rows(
    stretches: Sequence[Stretch],
    found: Mapping[int, RowParts],
    how: Mapping[int, Combine],
    comm: Comm,
    group: Group,
    stage: str,
    collection: int = 0,
) -> dict[int, torch.Tensor]:
    """Every row's statistic over all its columns, float64 `[U]` by slab index. Collective.

    Args:
        stretches: all of the collection (`stretches_of`). Those of the slabs in `found` count, which are the same on every rank, as
            is `how` their parts are put together.
        collection: whose step it is; on the group "backward", which forward call it belongs to.
    """
    wanted = [stretch for stretch in stretches if stretch[0].index in found]
    here = [stretch for stretch in wanted if any(strip.owner == comm.rank for strip in stretch)]
    spans = [[_span(found[strip.index], strip, comm.rank) for strip in stretch] for stretch in here]
    arrived = _swap(here, found, spans, comm, group, stage, collection)
    pieces: dict[int, list[tuple[slice, torch.Tensor]]] = defaultdict(list)
    for stretch, ranges, parts in zip(here, spans, arrived, strict=True):
        whole = how[stretch[0].index](parts)
        for strip, span in zip(stretch, ranges, strict=True):
            if strip.owner == comm.rank:
                pieces[strip.index].append((span, whole))
    return {index: _laid_out(pieces[index], parts) for index, parts in found.items()}


def _laid_out(pieces: Sequence[tuple[slice, torch.Tensor]], parts: RowParts) -> torch.Tensor:
    count = parts.rows_U.numel()
    if len(pieces) == 1 and pieces[0][1].numel() == count:
        return pieces[0][1]
    result = parts.parts.new_empty(count)
    for span, whole in pieces:
        result[span] = whole
    return result


def _span(parts: RowParts, strip: Strip, rank: int) -> slice:
    """Which of the slab's distinct rows lie in `strip`; nothing where this rank does not hold it."""
    if strip.owner != rank:
        return slice(0, 0)
    edges = torch.tensor([strip.first_key, strip.first_key + strip.rows], device=parts.rows_U.device)
    first, last = torch.searchsorted(parts.rows_U, edges).tolist()
    return slice(first, last)


def _swap(
    stretches: Sequence[Stretch],
    found: Mapping[int, RowParts],
    spans: Sequence[Sequence[slice]],
    comm: Comm,
    group: Group,
    stage: str,
    collection: int,
) -> list[list[torch.Tensor]]:
    """Every strip's parts of each of `stretches`, which this rank has strips of."""
    here = comm.rank
    known: list[list[torch.Tensor]] = [[] for _ in stretches]
    outgoing: list[list[torch.Tensor]] = [[] for _ in range(comm.world_size)]
    expected: list[list[tuple[int, int, list[int]]]] = [[] for _ in range(comm.world_size)]
    for place, (stretch, ranges) in enumerate(zip(stretches, spans, strict=True)):
        owners = [strip.owner for strip in stretch]
        # Twins have the same distinct rows, so what lies here says how many come from the others, whose spans are empty here.
        rows = max(span.stop - span.start for span in ranges)
        by_element = found[stretch[owners.index(here)].index].parts.dim() == 2
        known[place] = [torch.empty(0)] * len(stretch)
        for number, (strip, span) in enumerate(zip(stretch, ranges, strict=True)):
            if strip.owner != here:
                expected[strip.owner].append((place, number, [rows, strip.columns] if by_element else [rows]))
                continue
            known[place][number] = found[strip.index].parts[span]
            for other in sorted(set(owners) - {here}):
                outgoing[other].append(known[place][number].reshape(-1))
    flat = [parts for to_rank in outgoing for parts in to_rank]
    send = torch.cat(flat) if flat else next(iter(found.values())).parts.new_empty(0)
    send_sizes = [sum(parts.numel() for parts in to_rank) for to_rank in outgoing]
    receive_sizes = [sum(prod(shape) for *_, shape in from_rank) for from_rank in expected]
    received = comm.all_to_all(group, stage, send, send_sizes, receive_sizes, collection)
    if comm.world_size > 1:
        in_order = [entry for from_rank in expected for entry in from_rank]
        for (place, number, shape), parts in zip(in_order, received.split([prod(shape) for *_, shape in in_order]), strict=True):
            known[place][number] = parts.view(shape)
    return known
