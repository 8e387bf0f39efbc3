"""Ids to segments: what each rank is asked, slab by slab.

A segment is a list of ids of one table that live on one owner, answered by one vector. A feature's ids become segments in one
of two ways: "unique", where each distinct id of a table is a segment, shared by all features of the table; and "bag", where the
ids of one bag on one owner are. A table packed as bags still sends distinct ids for what a partial sum cannot serve: one vector
an id, max, weights, max_norm and scale_grad_by_freq. Ids of padding are left out of bags: before they are sent where they travel
by bag, and when they are pooled where they travel by id.

Legend: N ids, U distinct ids, E entries (a key in a segment), S segments, B bags, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shardembed.errors import IdRangeError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.route.entries import segment
from shardembed.journey.route.ownership import IdGroup, LookupPlan, RoutingTable, SlabLookupPlan, SlabOwners, positions_of
from shardembed.kernels.grouping import compiled, group
from shardembed.tables.table_config import Feature, Pooling
from shardembed.wire.message import Numbers


@dataclass(frozen=True)
class Unique:
    """Strips of features that are read by id and pooled alike, one after the other: the vector of their id i is answer
    `segments_N[i]`. With `padded`, the tables have a padding id, and `segments_N` is -1 where it stands in a bag.

    columns: (feature, strip).
    """

    columns: tuple[tuple[int, int], ...]
    pooling: Pooling
    weighted: bool
    padded: bool
    segments_N: torch.Tensor


@dataclass(frozen=True)
class SlabRoute:
    """What one rank asks of one slab.

    keys_E: keys grouped by owner. lengths_S: keys of each segment, or None when each has one. counts: segments and keys that go to
    each rank, int64 `[2, R]`. multiplicities_E: how often each key's id occurs, int32, or None where nobody wants to know.
    unique: how answers become outputs by id. bagged: (feature, strip) of those read by bag, in the slab's order.
    bag_segments, bag_starts: the answers that sum to each bag, `[sum of bags]` starts; None where answer b is bag b.
    """

    keys_E: torch.Tensor
    lengths_S: torch.Tensor | None
    counts: torch.Tensor
    multiplicities_E: torch.Tensor | None = None
    unique: tuple[Unique, ...] = ()
    bagged: tuple[tuple[int, int], ...] = ()
    bag_segments: torch.Tensor | None = None
    bag_starts: torch.Tensor | None = None


@dataclass(frozen=True)
class Route:
    """One batch's way to the owners and back: `combine` consumes it."""

    ids: IdBatch
    features: tuple[Feature, ...]
    slabs: tuple[SlabRoute, ...]

    def counts(self) -> Numbers:
        """Segments and keys that go to each rank, of all slabs, int64 `[slabs, 2, R]`. Host sync on a GPU."""
        return torch.stack([slab.counts for slab in self.slabs]).cpu().numpy()


@dataclass(frozen=True)
class _Distinct:
    """The distinct ids of the tables that are read by id.

    ids_U: ascending by (table, id), numbered through all tables. counts_U: how often each occurs. starts: where each table's
    begin, one more than tables, int64. numbers_N: of each id, feature by feature, its number among `ids_U`. sizes: ids of each
    feature.
    """

    ids_U: torch.Tensor
    counts_U: torch.Tensor
    starts: np.ndarray
    numbers_N: torch.Tensor
    sizes: np.ndarray


def make_route(ids: IdBatch, features: Sequence[Feature], routing: RoutingTable) -> Route:
    """Decide what to ask of whom.

    Raises:
        IdRangeError: an id is negative or not below its table's num_embeddings.
    """
    lookup_plan = routing.lookup_plan(tuple(features), ids.weighted)
    _check_range(ids, features, routing, lookup_plan)
    ids = _drop_padding(ids, lookup_plan)
    distinct = _distinct(ids, routing, lookup_plan)
    asked = zip(routing.slabs, lookup_plan.slabs, strict=True)
    slabs = tuple(_slab_route(slab, ids, pieces, distinct, routing.world_size) for slab, pieces in asked)
    return Route(ids, tuple(features), slabs)


def empty_route(features: Sequence[Feature], routing: RoutingTable) -> Route:
    """A route that asks nothing, for a rank whose batch was refused."""
    nothing = torch.zeros(2, routing.world_size, dtype=torch.int64)
    slabs = tuple(SlabRoute(slab.starts.new_empty(0), None, nothing.to(slab.starts.device)) for slab in routing.slabs)
    return Route(IdBatch(torch.empty(0, dtype=torch.int64), ()), tuple(features), slabs)


def _check_range(ids: IdBatch, features: Sequence[Feature], routing: RoutingTable, lookup_plan: LookupPlan) -> None:
    at = _first_outside(ids, lookup_plan)
    if at is None:
        return
    for number, (feature, size) in enumerate(zip(features, ids.sizes, strict=True)):
        if at < size:
            table = routing.tables[feature.table]
            raise IdRangeError(
                f"table {table.name!r}, feature {feature.name!r}: id {int(ids.parts[number].ids[at])} at position {at} is "
                f"outside the allowed range 0 to {table.num_embeddings - 1} (num_embeddings={table.num_embeddings})"
            )
        at -= size


def _first_outside(ids: IdBatch, lookup_plan: LookupPlan) -> int | None:
    """The place of the first id that is negative or not below its feature's limit."""
    if (kernels := compiled(ids.ids.device)) is not None:
        at = kernels.routing.first_outside(ids.ids.numpy(), np.array(ids.sizes), lookup_plan.rows)
        return None if at < 0 else at
    bad = (ids.ids < 0) | (ids.ids >= _spread(lookup_plan.rows, ids))
    return int(bad.nonzero()[0]) if bad.any() else None  # host sync on a GPU


def _spread(numbers: np.ndarray, ids: IdBatch) -> torch.Tensor:
    """One number a feature, repeated for each of its ids, `[N]`."""
    device = ids.ids.device
    if numbers.size == 1:
        return torch.tensor(int(numbers[0]), device=device)
    return torch.repeat_interleave(
        torch.from_numpy(numbers).to(device), torch.tensor(ids.sizes, device=device), output_size=ids.ids.numel()
    )


def _drop_padding(ids: IdBatch, lookup_plan: LookupPlan) -> IdBatch:
    """The batch without padding in the features that are read by bag."""
    if not lookup_plan.padded:
        return ids
    parts = list(ids.parts)
    for i, padding in lookup_plan.padded:
        parts[i] = parts[i].without(padding)
    return IdBatch.join(tuple(parts))


def _distinct(ids: IdBatch, routing: RoutingTable, lookup_plan: LookupPlan) -> _Distinct:
    if not lookup_plan.by_id:
        nothing = ids.ids[:0]
        return _Distinct(nothing, nothing, np.zeros(len(routing.table_starts), np.int64), nothing, np.zeros(0, np.int64))
    wanted = ids.ids if len(routing.tables) == 1 else ids.ids + _spread(lookup_plan.starts, ids)
    if len(lookup_plan.by_id) < len(ids.parts):
        parts = wanted.split(ids.sizes)
        wanted = _cat([parts[i] for i in lookup_plan.by_id], ids.ids)
    found = group(wanted, routing.table_starts[-1])
    starts = torch.searchsorted(found.numbers_U, torch.tensor(routing.table_starts, device=wanted.device))
    sizes = np.array([ids.sizes[i] for i in lookup_plan.by_id], dtype=np.int64)
    return _Distinct(found.numbers_U, found.counts(), starts.cpu().numpy(), found.inverse(), sizes)


def _slab_route(slab: SlabOwners, ids: IdBatch, pieces: SlabLookupPlan, distinct: _Distinct, world_size: int) -> SlabRoute:
    # The distinct ids of each lane, and what leads from a number among them all to an entry of the lane.
    tables = pieces.lanes[0]
    counts = distinct.starts[tables + 1] - distinct.starts[tables]
    ends = np.cumsum(counts)
    shifts, singles = ends - counts - distinct.starts[tables], int(ends[-1]) if ends.size else 0
    positions = _positions(distinct.ids_U, np.diff(distinct.starts), pieces.lanes) if singles else []
    bag_positions, lengths_B = _bag_entries(pieces, ids)
    owner_E, key_E = slab.locate(_cat(positions + bag_positions, ids.ids))
    found = segment(owner_E, key_E, singles, lengths_B, world_size, slab.lone_owner)
    multiplicities_E = None
    if slab.spec.policy.scale_grad_by_freq:  # then nothing is read by bag
        multiplicities_E = torch.empty(singles, dtype=torch.int32, device=key_E.device)
        spans = [distinct.starts[table : table + 2].tolist() for table in tables.tolist()]
        occur = [distinct.counts_U[start:stop] for start, stop in spans]
        multiplicities_E[found.segment_of_single] = _cat(occur, ids.ids).to(torch.int32)
    return SlabRoute(
        found.keys_E,
        found.lengths_S,
        found.counts,
        multiplicities_E,
        tuple(_unique(group, found.segment_of_single, distinct, shifts, ids) for group in pieces.by_id),
        pieces.bags,
        found.bag_segments,
        found.bag_starts,
    )


def _unique(pieces: IdGroup, segment_of_single: torch.Tensor, distinct: _Distinct, shifts: np.ndarray, ids: IdBatch) -> Unique:
    shift = shifts[pieces.lanes]
    if (kernels := compiled(segment_of_single.device)) is not None:
        of_single, numbers_N = segment_of_single.numpy(), distinct.numbers_N.numpy()
        found = kernels.routing.look_up(of_single, numbers_N, distinct.sizes, pieces.places, shift)
        segments_N = torch.from_numpy(found)
    else:
        streams = distinct.numbers_N.split(distinct.sizes.tolist())
        chosen = zip(pieces.places.tolist(), shift.tolist(), strict=True)
        segments_N = _cat([segment_of_single[streams[place] + more] for place, more in chosen], ids.ids)
    if pieces.paddings:
        there = zip(pieces.columns, pieces.paddings, strict=True)
        padding_N = torch.cat([ids.parts[feature].ids == padding for (feature, _), padding in there])
        segments_N = segments_N.masked_fill(padding_N, -1)
    return Unique(pieces.columns, pieces.pooling, pieces.weighted, bool(pieces.paddings), segments_N)


def _bag_entries(pieces: SlabLookupPlan, ids: IdBatch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The features read by bag: the positions of their ids, and the lengths of their bags."""
    if not pieces.bags:
        return [], ids.ids[:0]
    return _positions(ids.ids, np.array(ids.sizes), pieces.arrays), ids.bag_lengths([feature for feature, _ in pieces.bags])


def _positions(numbers: torch.Tensor, sizes: np.ndarray, arrays: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
    """Where rows stand among a slab's positions.

    Args:
        numbers: of several streams one after the other, `sizes[i]` of stream i. arrays: as in `SlabLookupPlan`.
    """
    if (kernels := compiled(numbers.device)) is not None:
        return [torch.from_numpy(kernels.routing.positions(numbers.numpy(), sizes, *arrays))]
    streams = numbers.split(sizes.tolist())
    lanes = zip(*(array.tolist() for array in arrays), strict=True)
    return [positions_of(streams[i] - low if low else streams[i], start, stride, rows) for i, start, stride, rows, low in lanes]


def _cat(tensors: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors) if tensors else like.new_empty(0, dtype=torch.int64)
