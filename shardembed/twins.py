"""Statistics of whole rows where columns lie on several ranks: one small exchange, made only where a plan needs it.

All strips of such a table are cut alike and are asked for the same ids, so the shards of one row block ("twins") see the same
distinct rows in the same order: they swap one partial result a row (in deterministic mode, one number an element), and nobody has
to say how many. One all-to-all serves all tables. Every twin combines the parts in strip order, so that all get the same bits.

Legend: U distinct rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from shardembed.comm import Comm, Group
from shardembed.slabs import Block, SlabSpec

Member = tuple[int, Block]  # slab index, block
Key = tuple[int, int]  # table, row block
Combine = Callable[[list[torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class RowParts:
    """A slab's contribution: distinct rows `[U]`, ascending, and its part of each row's statistic, float64: one number a row
    `[U]`, or one an element `[U, W]`.
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


def combine_rows(
    specs: Mapping[int, SlabSpec],
    found: Mapping[int, RowParts],
    how: Mapping[int, Combine],
    comm: Comm,
    group: Group,
    stage: str,
    collection: int = 0,
) -> dict[int, torch.Tensor]:
    """Every row's statistic over all its columns, float64 `[U]` by slab index. Collective.

    Args:
        specs: the slabs that hold split rows, by index; the same on every rank, as is `how` their parts are put together.
        collection: whose step it is; on the group "backward", which forward call it belongs to.
    """
    twins = _twins(list(specs.values()))
    spans = {key: [_span(found[index], block, comm.rank) for index, block in members] for key, members in twins.items()}
    arrived = _swap(twins, found, spans, comm, group, stage, collection)
    result = {index: parts.parts.new_empty(parts.rows_U.numel()) for index, parts in found.items()}
    for key, members in twins.items():
        if not any(_owner(block) == comm.rank for _, block in members):
            continue
        whole = how[members[0][0]]([arrived[key, number] for number in range(len(members))])
        for (index, block), span in zip(members, spans[key], strict=True):
            if _owner(block) == comm.rank:
                result[index][span] = whole
    return result


def _twins(specs: Sequence[SlabSpec]) -> dict[Key, list[Member]]:
    """The blocks of each row block, in strip order."""
    found: dict[Key, dict[int, Member]] = defaultdict(dict)
    for spec in specs:
        for lane in spec.lanes:
            for number, block in enumerate(lane.blocks):
                found[lane.table, number][lane.strip] = (spec.index, block)
    return {key: [members[strip] for strip in sorted(members)] for key, members in sorted(found.items())}


def _owner(block: Block) -> int:
    return block.shard.ranks[0]


def _span(parts: RowParts, block: Block, rank: int) -> slice:
    """Which of the slab's rows lie in `block`; nothing where this rank does not hold it."""
    if _owner(block) != rank:
        return slice(0, 0)
    edges = torch.tensor([block.first_key, block.first_key + len(block.shard.rows)], device=parts.rows_U.device)
    first, last = torch.searchsorted(parts.rows_U, edges).tolist()
    return slice(first, last)


def _swap(
    twins: Mapping[Key, list[Member]],
    found: Mapping[int, RowParts],
    spans: Mapping[Key, list[slice]],
    comm: Comm,
    group: Group,
    stage: str,
    collection: int,
) -> dict[tuple[Key, int], torch.Tensor]:
    """The parts of every twin of a block this rank holds, by (table and block, strip)."""
    here = comm.rank
    known: dict[tuple[Key, int], torch.Tensor] = {}
    outgoing: list[list[torch.Tensor]] = [[] for _ in range(comm.world_size)]
    expected: list[list[tuple[Key, int, list[int]]]] = [[] for _ in range(comm.world_size)]
    for key, members in twins.items():
        owners = [_owner(block) for _, block in members]
        if here not in owners:
            continue
        rows = max(span.stop - span.start for span in spans[key])
        by_element = found[members[owners.index(here)][0]].parts.dim() == 2
        for number, ((index, block), owner, span) in enumerate(zip(members, owners, spans[key], strict=True)):
            if owner != here:
                expected[owner].append((key, number, [rows, len(block.shard.columns)] if by_element else [rows]))
                continue
            known[key, number] = found[index].parts[span]
            for other in sorted(set(owners) - {here}):
                outgoing[other].append(known[key, number].reshape(-1))
    flat = [parts for to_rank in outgoing for parts in to_rank]
    send = torch.cat(flat) if flat else next(iter(found.values())).parts.new_empty(0)
    send_sizes = [sum(parts.numel() for parts in to_rank) for to_rank in outgoing]
    receive_sizes = [sum(prod(shape) for *_, shape in from_rank) for from_rank in expected]
    received = comm.all_to_all(group, stage, send, send_sizes, receive_sizes, collection)
    if comm.world_size > 1:
        in_order = [entry for from_rank in expected for entry in from_rank]
        for (key, number, shape), parts in zip(in_order, received.split([prod(shape) for *_, shape in in_order]), strict=True):
            known[key, number] = parts.view(shape)
    return known
