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
from dataclasses import dataclass, replace

import torch

from shardembed.errors import IdRangeError
from shardembed.ids import IdBatch
from shardembed.kernels.reference import stable_order
from shardembed.route.ownership import Atlas, SlabAtlas
from shardembed.tables import Feature


@dataclass(frozen=True)
class UniquePiece:
    """A feature's strip, read by id: the vector of its id i is answer `segments_N[i]`. With `padded`, the table has a padding
    id, and `segments_N` is -1 where it stands in a bag.
    """

    feature: int
    strip: int
    segments_N: torch.Tensor
    padded: bool = False


@dataclass(frozen=True)
class BagPiece:
    """A feature's strip, read by bag: its bags are `bags` consecutive ones of the slab's bag list."""

    feature: int
    strip: int
    bags: int


@dataclass(frozen=True)
class SlabRoute:
    """What one rank asks of one slab.

    keys_E: keys grouped by owner. lengths_S: keys of each segment, or None when each has one. keys, segments: how many go to
    each rank. multiplicities_E: how often each key's id occurs, int32, or None where nobody wants to know.
    unique, bagged: how answers become outputs. bag_segments, bag_starts: the answers that sum to each bag, `[sum of bags]`
    starts.
    """

    keys_E: torch.Tensor
    lengths_S: torch.Tensor | None
    keys: list[int]
    segments: list[int]
    multiplicities_E: torch.Tensor | None = None
    unique: tuple[UniquePiece, ...] = ()
    bagged: tuple[BagPiece, ...] = ()
    bag_segments: torch.Tensor | None = None
    bag_starts: torch.Tensor | None = None


@dataclass(frozen=True)
class Route:
    """One batch's way to the owners and back: `combine` consumes it."""

    ids: IdBatch
    features: tuple[Feature, ...]
    slabs: tuple[SlabRoute, ...]


@dataclass(frozen=True)
class _Distinct:
    """The distinct ids of the tables that are read by id.

    ids_U: ascending by (table, id), numbered through all tables. counts_U: how often each occurs. starts: where each table's
    begin, one more than tables. index: by feature, the number of each of its ids among `ids_U`.
    """

    ids_U: torch.Tensor
    counts_U: torch.Tensor
    starts: list[int]
    index: dict[int, torch.Tensor]


def make_route(ids: IdBatch, features: Sequence[Feature], atlas: Atlas) -> Route:
    """Decide what to ask of whom.

    Raises:
        IdRangeError: an id is negative or not below its table's num_embeddings.
    """
    _check_range(ids, features, atlas)
    by_bag = [_read_by_bag(feature, ids.parts[i].weights is not None, atlas) for i, feature in enumerate(features)]
    ids = _drop_padding(ids, features, by_bag, atlas)
    distinct = _distinct(ids, features, by_bag, atlas)
    slabs = tuple(_slab_route(slab, ids, features, by_bag, distinct, atlas) for slab in atlas.slabs)
    return Route(ids, tuple(features), slabs)


def empty_route(features: Sequence[Feature], atlas: Atlas) -> Route:
    """A route that asks nothing, for a rank whose batch was refused."""
    nothing = [0] * atlas.world_size
    slabs = tuple(SlabRoute(slab.starts.new_empty(0), None, nothing, nothing) for slab in atlas.slabs)
    return Route(IdBatch(torch.empty(0, dtype=torch.int64), ()), tuple(features), slabs)


def _check_range(ids: IdBatch, features: Sequence[Feature], atlas: Atlas) -> None:
    limits = _spread([atlas.tables[feature.table].num_embeddings for feature in features], ids)
    bad = (ids.ids < 0) | (ids.ids >= limits)
    if not bad.any():  # host sync on a GPU
        return
    at = int(bad.nonzero()[0])
    for number, (feature, size) in enumerate(zip(features, ids.sizes, strict=True)):
        if at < size:
            table = atlas.tables[feature.table]
            raise IdRangeError(
                f"table {table.name!r}, feature {feature.name!r}: id {int(ids.parts[number].ids[at])} at position {at} is "
                f"outside the allowed range 0 to {table.num_embeddings - 1} (num_embeddings={table.num_embeddings})"
            )
        at -= size


def _spread(numbers: list[int], ids: IdBatch) -> torch.Tensor:
    """One number a feature, repeated for each of its ids, `[N]`."""
    if len(numbers) == 1:
        return torch.tensor(numbers[0], device=ids.ids.device)
    device = ids.ids.device
    return torch.repeat_interleave(
        torch.tensor(numbers, device=device), torch.tensor(ids.sizes, device=device), output_size=ids.ids.numel()
    )


def _read_by_bag(feature: Feature, weighted: bool, atlas: Atlas) -> bool:
    policy = atlas.tables[feature.table].policy
    # Renormalised rows and frequencies belong to ids: an owner must see each distinct one.
    by_id = policy.max_norm is not None or policy.scale_grad_by_freq
    return atlas.packings[feature.table] == "bag" and feature.pooling in ("sum", "mean") and not weighted and not by_id


def _drop_padding(ids: IdBatch, features: Sequence[Feature], by_bag: list[bool], atlas: Atlas) -> IdBatch:
    """The batch without padding in the features that are read by bag."""
    parts = list(ids.parts)
    for i, feature in enumerate(features):
        padding = atlas.tables[feature.table].padding_idx
        if by_bag[i] and padding is not None:
            parts[i] = parts[i].without(padding)
    return ids if all(new is old for new, old in zip(parts, ids.parts, strict=True)) else IdBatch.join(tuple(parts))


def _distinct(ids: IdBatch, features: Sequence[Feature], by_bag: list[bool], atlas: Atlas) -> _Distinct:
    numbered = ids.ids + _spread([atlas.table_starts[feature.table] for feature in features], ids)
    chosen = [i for i, bag in enumerate(by_bag) if not bag]
    if len(chosen) == len(features):
        wanted = numbered
    else:
        parts = numbered.split(ids.sizes)
        wanted = torch.cat([parts[i] for i in chosen]) if chosen else numbered[:0]
    # Host sync on a GPU: the number of distinct ids.
    ids_U, inverse, counts_U = torch.unique(wanted, return_inverse=True, return_counts=True)
    starts = torch.searchsorted(ids_U, torch.tensor(atlas.table_starts, device=ids_U.device)).tolist()
    index = dict(zip(chosen, inverse.split([ids.sizes[i] for i in chosen]), strict=True))
    return _Distinct(ids_U, counts_U, starts, index)


def _slab_route(
    slab: SlabAtlas, ids: IdBatch, features: Sequence[Feature], by_bag: list[bool], distinct: _Distinct, atlas: Atlas
) -> SlabRoute:
    positions: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    shifts: list[int] = []  # by lane: from a number among the distinct ids to an entry
    singles = 0
    for number, lane in enumerate(slab.spec.lanes):
        start, stop = distinct.starts[lane.table : lane.table + 2]
        shifts.append(singles - start)
        if start < stop:
            table_ids = distinct.ids_U[start:stop] - atlas.table_starts[lane.table]
            positions.append(slab.positions(number, table_ids, atlas.tables[lane.table].num_embeddings))
            counts.append(distinct.counts_U[start:stop])
            singles += stop - start
    bagged, bag_positions, bag_of_entry = _bag_entries(slab, ids, features, by_bag, atlas)
    owner_E, key_E = slab.locate(_cat(positions + bag_positions, ids.ids))
    sorting = _group_by_owner(owner_E, slab.lone_owner, atlas.world_size)
    if bagged:
        bags = sum(piece.bags for piece in bagged)
        route, segment_E = _bag_segments(owner_E, key_E, sorting, singles, bag_of_entry, bags, atlas.world_size)
    else:
        route, segment_E = _single_segments(owner_E, key_E, sorting, atlas.world_size)
    if slab.spec.policy.scale_grad_by_freq:  # then nothing is read by bag
        counts_E = _cat(counts, ids.ids).to(torch.int32)
        route = replace(route, multiplicities_E=counts_E if sorting is None else counts_E[sorting])
    unique = tuple(
        _unique_piece(feature, lane.strip, segment_E[index + shift if shift else index], ids, features, atlas)
        for lane, shift in zip(slab.spec.lanes, shifts, strict=True)
        for feature, index in distinct.index.items()
        if features[feature].table == lane.table
    )
    return replace(route, unique=unique, bagged=tuple(bagged))


def _unique_piece(
    feature: int, strip: int, segments_N: torch.Tensor, ids: IdBatch, features: Sequence[Feature], atlas: Atlas
) -> UniquePiece:
    padding = atlas.tables[features[feature].table].padding_idx
    if padding is None or features[feature].pooling is None:  # unpooled, padding is answered with its row
        return UniquePiece(feature, strip, segments_N)
    return UniquePiece(feature, strip, segments_N.masked_fill(ids.parts[feature].ids == padding, -1), padded=True)


def _bag_entries(
    slab: SlabAtlas, ids: IdBatch, features: Sequence[Feature], by_bag: list[bool], atlas: Atlas
) -> tuple[list[BagPiece], list[torch.Tensor], torch.Tensor]:
    """The features read by bag: their pieces, the positions of their ids, and each id's bag, numbered through the slab."""
    pieces: list[BagPiece] = []
    positions: list[torch.Tensor] = []
    lengths: list[torch.Tensor] = []
    parts = ids.ids.split(ids.sizes)
    for number, lane in enumerate(slab.spec.lanes):
        for i, feature in enumerate(features):
            if by_bag[i] and feature.table == lane.table:
                pieces.append(BagPiece(i, lane.strip, ids.parts[i].bags))
                positions.append(slab.positions(number, parts[i], atlas.tables[lane.table].num_embeddings))
                lengths.append(ids.parts[i].bag_lengths())
    bags = torch.repeat_interleave(_cat(lengths, ids.ids), output_size=sum(part.numel() for part in positions))
    return pieces, positions, bags


def _group_by_owner(owner_E: torch.Tensor, lone_owner: int | None, world_size: int) -> torch.Tensor | None:
    """The order that puts entries of one owner side by side and keeps theirs; None when they already are."""
    return None if lone_owner is not None else stable_order(owner_E, world_size)


def _single_segments(
    owner_E: torch.Tensor, key_E: torch.Tensor, sorting: torch.Tensor | None, world_size: int
) -> tuple[SlabRoute, torch.Tensor]:
    """Every entry a segment: (the route, the segment of each entry)."""
    counts = torch.bincount(owner_E, minlength=world_size).tolist()
    arange = torch.arange(owner_E.numel(), device=owner_E.device)
    if sorting is None:
        return SlabRoute(key_E, None, counts, counts), arange
    segment_E = torch.empty_like(sorting)
    segment_E[sorting] = arange
    return SlabRoute(key_E[sorting], None, counts, counts), segment_E


def _bag_segments(
    owner_E: torch.Tensor,
    key_E: torch.Tensor,
    sorting: torch.Tensor | None,
    singles: int,
    bag_of_entry: torch.Tensor,
    bags: int,
    world_size: int,
) -> tuple[SlabRoute, torch.Tensor]:
    """The first `singles` entries are segments of their own; of the others, those with one owner and one bag are."""
    device = owner_E.device
    group_E = torch.cat([torch.arange(singles, device=device), bag_of_entry + singles])
    if sorting is None:
        sorting = torch.arange(owner_E.numel(), device=device)
    owners, groups = owner_E[sorting], group_E[sorting]
    begins = torch.ones_like(owners, dtype=torch.bool)
    begins[1:] = (owners[1:] != owners[:-1]) | (groups[1:] != groups[:-1])
    first_S = begins.nonzero().squeeze(1)  # host sync on a GPU: the number of segments
    segment_E = torch.empty_like(sorting)
    segment_E[sorting] = begins.cumsum(0) - 1
    group_S = groups[first_S]
    bag_segments = stable_order(group_S, singles + bags)[singles:]
    per_bag = torch.bincount(group_S[bag_segments] - singles, minlength=bags)
    ends = torch.tensor([owners.numel()], device=device)
    route = SlabRoute(
        keys_E=key_E[sorting],
        lengths_S=torch.cat([first_S, ends]).diff(),
        keys=torch.bincount(owners, minlength=world_size).tolist(),
        segments=torch.bincount(owners[first_S], minlength=world_size).tolist(),
        bag_segments=bag_segments,
        bag_starts=per_bag.cumsum(0) - per_bag,
    )
    return route, segment_E


def _cat(tensors: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors) if tensors else like.new_empty(0, dtype=torch.int64)
