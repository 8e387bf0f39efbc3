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
from itertools import accumulate

import numpy as np
import torch

from shardembed.errors import IdRangeError
from shardembed.ids import IdBatch
from shardembed.kernels.grouping import compiled, group
from shardembed.route.entries import segment
from shardembed.route.ownership import Atlas, BagPieces, Reading, SlabAtlas, positions_of
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
class SlabRoute:
    """What one rank asks of one slab.

    keys_E: keys grouped by owner. lengths_S: keys of each segment, or None when each has one. keys, segments: how many go to
    each rank. multiplicities_E: how often each key's id occurs, int32, or None where nobody wants to know.
    unique: how answers become outputs by id. bagged: (feature, strip) of those read by bag, in the slab's order.
    bag_segments, bag_starts: the answers that sum to each bag, `[sum of bags]` starts; None where answer b is bag b.
    """

    keys_E: torch.Tensor
    lengths_S: torch.Tensor | None
    keys: list[int]
    segments: list[int]
    multiplicities_E: torch.Tensor | None = None
    unique: tuple[UniquePiece, ...] = ()
    bagged: tuple[tuple[int, int], ...] = ()
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
    begin, one more than tables. index: by table, its features and the number of each of their ids among `ids_U`.
    """

    ids_U: torch.Tensor
    counts_U: torch.Tensor
    starts: list[int]
    index: dict[int, list[tuple[int, torch.Tensor]]]


def make_route(ids: IdBatch, features: Sequence[Feature], atlas: Atlas) -> Route:
    """Decide what to ask of whom.

    Raises:
        IdRangeError: an id is negative or not below its table's num_embeddings.
    """
    reading = atlas.reading(tuple(features), tuple(part.weights is not None for part in ids.parts))
    _check_range(ids, features, atlas, reading)
    ids = _drop_padding(ids, reading)
    distinct = _distinct(ids, features, atlas, reading)
    asked = zip(atlas.slabs, reading.slabs, strict=True)
    slabs = tuple(_slab_route(slab, ids, features, pieces, distinct, atlas) for slab, pieces in asked)
    return Route(ids, tuple(features), slabs)


def empty_route(features: Sequence[Feature], atlas: Atlas) -> Route:
    """A route that asks nothing, for a rank whose batch was refused."""
    nothing = [0] * atlas.world_size
    slabs = tuple(SlabRoute(slab.starts.new_empty(0), None, nothing, nothing) for slab in atlas.slabs)
    return Route(IdBatch(torch.empty(0, dtype=torch.int64), ()), tuple(features), slabs)


def _check_range(ids: IdBatch, features: Sequence[Feature], atlas: Atlas, reading: Reading) -> None:
    at = _first_outside(ids, reading)
    if at is None:
        return
    for number, (feature, size) in enumerate(zip(features, ids.sizes, strict=True)):
        if at < size:
            table = atlas.tables[feature.table]
            raise IdRangeError(
                f"table {table.name!r}, feature {feature.name!r}: id {int(ids.parts[number].ids[at])} at position {at} is "
                f"outside the allowed range 0 to {table.num_embeddings - 1} (num_embeddings={table.num_embeddings})"
            )
        at -= size


def _first_outside(ids: IdBatch, reading: Reading) -> int | None:
    """The place of the first id that is negative or not below its feature's limit."""
    if (kernels := compiled(ids.ids.device)) is not None:
        at = kernels.routing.first_outside(ids.ids.numpy(), np.array(ids.sizes), reading.rows)
        return None if at < 0 else at
    bad = (ids.ids < 0) | (ids.ids >= _spread(reading.rows, ids))
    return int(bad.nonzero()[0]) if bad.any() else None  # host sync on a GPU


def _spread(numbers: np.ndarray, ids: IdBatch) -> torch.Tensor:
    """One number a feature, repeated for each of its ids, `[N]`."""
    device = ids.ids.device
    if numbers.size == 1:
        return torch.tensor(int(numbers[0]), device=device)
    return torch.repeat_interleave(
        torch.from_numpy(numbers).to(device), torch.tensor(ids.sizes, device=device), output_size=ids.ids.numel()
    )


def _drop_padding(ids: IdBatch, reading: Reading) -> IdBatch:
    """The batch without padding in the features that are read by bag."""
    if not reading.padded:
        return ids
    parts = list(ids.parts)
    for i, padding in reading.padded:
        parts[i] = parts[i].without(padding)
    return IdBatch.join(tuple(parts))


def _distinct(ids: IdBatch, features: Sequence[Feature], atlas: Atlas, reading: Reading) -> _Distinct:
    if not reading.by_id:
        return _Distinct(ids.ids[:0], ids.ids[:0], [0] * len(atlas.table_starts), {})
    wanted = ids.ids if len(atlas.tables) == 1 else ids.ids + _spread(reading.starts, ids)
    if len(reading.by_id) < len(ids.parts):
        parts = wanted.split(ids.sizes)
        wanted = _cat([parts[i] for i in reading.by_id], ids.ids)
    found = group(wanted, atlas.table_starts[-1])
    starts = torch.searchsorted(found.numbers_U, torch.tensor(atlas.table_starts, device=wanted.device)).tolist()
    index: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for i, numbers in zip(reading.by_id, found.inverse().split([ids.sizes[i] for i in reading.by_id]), strict=True):
        index.setdefault(features[i].table, []).append((i, numbers))
    return _Distinct(found.numbers_U, found.counts(), starts, index)


def _slab_route(
    slab: SlabAtlas, ids: IdBatch, features: Sequence[Feature], pieces: BagPieces, distinct: _Distinct, atlas: Atlas
) -> SlabRoute:
    ends = [distinct.starts[lane.table : lane.table + 2] for lane in slab.spec.lanes]
    *entries, singles = accumulate((stop - start for start, stop in ends), initial=0)
    # From a number among the distinct ids to an entry, by lane.
    shifts = [entry - start for entry, (start, _) in zip(entries, ends, strict=True)]
    positions = _positions(distinct.ids_U, np.diff(distinct.starts), pieces.lanes) if singles else []
    bag_positions, lengths_B = _bag_entries(pieces, ids)
    owner_E, key_E = slab.locate(_cat(positions + bag_positions, ids.ids))
    found = segment(owner_E, key_E, singles, lengths_B, atlas.world_size, slab.lone_owner)
    multiplicities_E = None
    if slab.spec.policy.scale_grad_by_freq:  # then nothing is read by bag
        multiplicities_E = torch.empty(singles, dtype=torch.int32, device=key_E.device)
        counts = [distinct.counts_U[start:stop] for start, stop in ends]
        multiplicities_E[found.segment_of_single] = _cat(counts, ids.ids).to(torch.int32)
    of_single = found.segment_of_single
    unique = tuple(
        _unique_piece(feature, lane.strip, of_single[index + shift if shift else index], ids, features, atlas)
        for lane, shift in zip(slab.spec.lanes, shifts, strict=True)
        for feature, index in distinct.index.get(lane.table, ())
    )
    return SlabRoute(
        found.keys_E,
        found.lengths_S,
        found.keys,
        found.segments,
        multiplicities_E,
        unique,
        pieces.columns,
        found.bag_segments,
        found.bag_starts,
    )


def _unique_piece(
    feature: int, strip: int, segments_N: torch.Tensor, ids: IdBatch, features: Sequence[Feature], atlas: Atlas
) -> UniquePiece:
    padding = atlas.tables[features[feature].table].padding_idx
    if padding is None or features[feature].pooling is None:  # unpooled, padding is answered with its row
        return UniquePiece(feature, strip, segments_N)
    return UniquePiece(feature, strip, segments_N.masked_fill(ids.parts[feature].ids == padding, -1), padded=True)


def _bag_entries(pieces: BagPieces, ids: IdBatch) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The features read by bag: the positions of their ids, and the lengths of their bags."""
    if not pieces.columns:
        return [], ids.ids[:0]
    parts = [ids.parts[i] for i, _ in pieces.columns]
    uniform = [part.lengths for part in parts if isinstance(part.lengths, int)]
    if len(uniform) < len(parts):
        lengths = _cat([part.bag_lengths() for part in parts], ids.ids)
    else:
        lengths = torch.from_numpy(np.repeat(uniform, [part.bags for part in parts])).to(ids.ids.device)
    return _positions(ids.ids, np.array(ids.sizes), pieces.arrays), lengths


def _positions(numbers: torch.Tensor, sizes: np.ndarray, arrays: tuple[np.ndarray, ...]) -> list[torch.Tensor]:
    """Where rows stand among a slab's positions.

    Args:
        numbers: of several streams one after the other, `sizes[i]` of stream i. arrays: as in `BagPieces`.
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
