"""Entries of one slab to segments: those of one owner side by side, and of them those of one bag. On a CPU by the compiled kernels
(`kernels.numba.routing`) where Numba is installed, elsewhere in plain torch; both give the same numbers.

Legend: N ids, U distinct ids, L lanes, E entries (a key in a segment), S segments, B bags, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from shardembed.inputs.ids import IdBatch
from shardembed.journey.route.distinct import Distinct, cat
from shardembed.journey.route.ownership import IdGroup, SlabLookupPlan, SlabOwners, positions_of
from shardembed.kernels.grouping import compiled, stable_order
from shardembed.kernels.mixing import buckets_of
from shardembed.kernels.pooling import lengths_of
from shardembed.tables.pooling import POOLINGS
from shardembed.wire.message import Numbers


@dataclass(frozen=True)
class Segments:
    """What to ask of each owner.

    Attributes:
        keys_E: grouped by owner.
        lengths_S: keys of each segment, or None when each has one.
        counts: segments and keys that go to each rank, int64 `[2, R]`.
        of_single: the segments of the entries that are one each.
        shifts: what added to an id's number among the distinct ones gives its single in each lane, int64 `[L]`.
        bag_segments: the segments of each bag, one bag after the other; None where bag b is segment b. Where outputs lie side by
            side, the bags stand sample by sample.
        bag_starts: where those of each bag begin, `[sum of bags]`; None likewise.
    """

    keys_E: torch.Tensor
    lengths_S: torch.Tensor | None
    counts: torch.Tensor
    of_single: torch.Tensor
    shifts: Numbers
    bag_segments: torch.Tensor | None = None
    bag_starts: torch.Tensor | None = None


def ask(
    slab: SlabOwners,
    lookup_plan: SlabLookupPlan,
    ids: IdBatch,
    distinct: Distinct,
    world_size: int,
    samples: int | None,
) -> Segments:
    """What to ask of one slab: each distinct id of the tables that are read by id, and the bags of what is read by bag.

    Args:
        samples: the bags of each feature that pools, where its output lies beside the others.
    """
    side_by_side = max(1, len(lookup_plan.bags)) if samples else 1
    if (kernels := compiled(ids.ids.device)) is None:
        return _ask(slab, lookup_plan, ids, distinct, world_size, side_by_side)
    batch = ids.ids.numpy(), ids.sizes_F, lookup_plan.bag_lanes, ids.bags_F, ids.lengths_B.numpy()
    owners = slab.blocks.numpy(), -1 if slab.lone_owner is None else slab.lone_owner
    found = kernels.routing.ask(
        distinct.ids_U.numpy(),
        distinct.starts,
        lookup_plan.lanes,
        *batch,
        *owners,
        slab.keys,
        world_size,
        side_by_side,
        slab.spec.is_dynamic,
    )
    keys_E, lengths_S, counts, of_single, bag_segments, bag_starts = map(torch.from_numpy, found[:6])
    shifts, bags, moved = found[6:]
    if not bags:
        return Segments(keys_E, None, counts, of_single, shifts)
    return Segments(keys_E, lengths_S, counts, of_single, shifts, *((bag_segments, bag_starts) if moved else ()))


def _ask(
    slab: SlabOwners,
    lookup_plan: SlabLookupPlan,
    ids: IdBatch,
    distinct: Distinct,
    world_size: int,
    side_by_side: int,
) -> Segments:
    """In plain torch."""
    tables = lookup_plan.lanes[0]
    counts = distinct.starts[tables + 1] - distinct.starts[tables]
    ends = np.cumsum(counts)
    shifts, singles = ends - counts - distinct.starts[tables], int(ends[-1]) if ends.size else 0
    streams = [(distinct.ids_U, np.diff(distinct.starts), lookup_plan.lanes)] if singles else []
    lengths_B = ids.ids[:0]
    if lookup_plan.bags:
        streams.append((ids.ids, ids.sizes_F, lookup_plan.bag_lanes))
        lengths_B = ids.bag_lengths(lookup_plan.bag_lanes[0].tolist())
    if slab.spec.is_dynamic:
        owner_E, key_E = _by_bucket(slab, streams, ids.ids)
    else:
        owner_E, key_E = slab.locate(cat([part for stream in streams for part in _positions(*stream)], ids.ids))
    lone = slab.lone_owner
    if lone is not None and not (singles and lengths_B.numel()) and bool((lengths_B > 0).all()):
        return _of_one_owner(key_E, singles, lengths_B, shifts, world_size, lone, side_by_side)
    return _segment(owner_E, key_E, singles, lengths_B, shifts, world_size, side_by_side)


def _positions(numbers: torch.Tensor, sizes: Numbers, lanes: Numbers) -> list[torch.Tensor]:
    """Where rows stand among a slab's positions.

    Args:
        numbers: of several streams one after the other, `sizes[i]` of stream i. lanes: `LaneNumbers`.
    """
    streams = numbers.split(sizes.tolist())
    columns = zip(*lanes[:5].tolist(), strict=True)
    return [positions_of(streams[i] - low if low else streams[i], start, stride, rows) for i, start, stride, rows, low in columns]


def _by_bucket(
    slab: SlabOwners, streams: Sequence[tuple[torch.Tensor, Numbers, Numbers]], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(owner, id) of each id of a dynamic table's streams; each as the arguments of `_positions`."""
    found: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    for ids, sizes, lanes in streams:
        parts = ids.split(sizes.tolist())
        for i, start, stride, buckets in zip(*lanes[:4].tolist(), strict=True):
            found.append(parts[i])
            positions.append(positions_of(buckets_of(parts[i], buckets), start, stride, buckets))
    return slab.locate(cat(positions, like))[0], cat(found, like)


def _of_one_owner(
    key_E: torch.Tensor, singles: int, lengths_B: torch.Tensor, shifts: Numbers, world_size: int, owner: int, side_by_side: int
) -> Segments:
    """Only singles, or only bags and none of them empty: no key has to move."""
    bags = lengths_B.numel()
    counts = torch.zeros(2, world_size, dtype=torch.int64)
    counts[:, owner] = torch.tensor([bags or singles, key_E.numel()])
    of_single = torch.arange(singles, device=key_E.device)
    found = Segments(key_E, lengths_B if bags else None, counts.to(key_E.device), of_single, shifts)
    if not bags or side_by_side == 1:
        return found
    each = torch.arange(bags, device=key_E.device)
    return replace(found, bag_segments=each.view(side_by_side, -1).T.reshape(-1), bag_starts=each)


def _segment(
    owner_E: torch.Tensor,
    key_E: torch.Tensor,
    singles: int,
    lengths_B: torch.Tensor,
    shifts: Numbers,
    world_size: int,
    side_by_side: int,
) -> Segments:
    """The first `singles` entries are segments of their own; of the others, which belong to bags of `lengths_B`, those with one
    owner and one bag are.
    """
    device, bags = owner_E.device, lengths_B.numel()
    sorting = stable_order(owner_E, world_size)
    places_B = torch.arange(bags, device=device).view(-1, side_by_side).T.reshape(-1)  # where each bag is to stand
    bag_of_entry = torch.repeat_interleave(places_B, lengths_B, output_size=owner_E.numel() - singles)
    groups = torch.cat([torch.arange(singles, device=device), bag_of_entry + singles])[sorting]
    owners = owner_E[sorting]
    begins = torch.ones_like(owners, dtype=torch.bool)
    begins[1:] = (owners[1:] != owners[:-1]) | (groups[1:] != groups[:-1])
    first_S = begins.nonzero().squeeze(1)  # host sync on a GPU: the number of segments
    segment_E = torch.empty_like(sorting)
    segment_E[sorting] = begins.cumsum(0) - 1
    keys = torch.bincount(owners, minlength=world_size)
    if not bags:
        return Segments(key_E[sorting], None, torch.stack([keys, keys]), segment_E, shifts)
    group_S = groups[first_S]
    bag_segments = stable_order(group_S, singles + bags)[singles:]
    per_bag = torch.bincount(group_S[bag_segments] - singles, minlength=bags)
    return Segments(
        key_E[sorting],
        lengths_of(first_S, owners.numel()),
        torch.stack([torch.bincount(owners[first_S], minlength=world_size), keys]),
        segment_E[:singles],
        shifts,
        bag_segments,
        per_bag.cumsum(0) - per_bag,
    )


def read(
    pieces: IdGroup, asked: Segments, distinct: Distinct, ids: IdBatch, by_id: Numbers, samples: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The segment of each id of strips that pool alike, `[N]`, -1 for padding; and where each bag of them begins, `[B]`.

    samples: as in `ask`. Bags whose ids have weights stand strip by strip all the same, as the weights do.
    """
    samples = None if pieces.weighted else samples
    pooled = POOLINGS[pieces.pooling].over_ids is not None
    if (kernels := compiled(ids.ids.device)) is not None:
        numbers = asked.of_single.numpy(), distinct.numbers_N.numpy(), asked.shifts, pieces.strips, by_id
        batch = ids.ids.numpy(), ids.sizes_F, ids.bags_F, ids.lengths_B.numpy()
        segments_N, starts_B = kernels.routing.read(*numbers, *batch, pooled, samples is not None, pieces.padded)
        return torch.from_numpy(segments_N), torch.from_numpy(starts_B)
    features, lanes, paddings = pieces.strips.tolist()
    streams = dict(zip(by_id.tolist(), distinct.numbers_N.split(ids.sizes_F[by_id].tolist()), strict=True))
    shifts = asked.shifts.tolist()
    segments_N = cat([asked.of_single[streams[f] + shifts[lane]] for f, lane in zip(features, lanes, strict=True)], ids.ids)
    if pieces.padded:
        there = zip(features, paddings, strict=True)
        segments_N = segments_N.masked_fill(torch.cat([ids.parts[f].ids == padding for f, padding in there]), -1)
    lengths_B = ids.bag_lengths(features) if pooled else ids.ids[:0]
    if pooled and samples and len(features) > 1:
        starts_B = lengths_B.cumsum(0) - lengths_B
        lengths_B, begins_B = (numbers.view(-1, samples).T.reshape(-1) for numbers in (lengths_B, starts_B))
        ends_B = lengths_B.cumsum(0)
        moves_N = torch.repeat_interleave(begins_B - (ends_B - lengths_B), lengths_B, output_size=segments_N.numel())
        segments_N = segments_N[torch.arange(segments_N.numel(), device=segments_N.device) + moves_N]
    return segments_N, lengths_B.cumsum(0) - lengths_B
