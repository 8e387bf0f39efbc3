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
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from shardembed.errors import IdRangeError
from shardembed.inputs.ids import IdBatch
from shardembed.journey.route.columns import Columns
from shardembed.journey.route.distinct import Distinct, cat, find_distinct, of_features
from shardembed.journey.route.entries import Segments, ask, read
from shardembed.journey.route.on_device import ask_all
from shardembed.journey.route.ownership import IdGroup, LookupPlan, RoutingTable, SlabLookupPlan, SlabOwners
from shardembed.kernels import triton
from shardembed.kernels.grouping import compiled
from shardembed.kernels.host import to_host
from shardembed.kernels.pooling import BagsOf
from shardembed.tables.table_config import Feature
from shardembed.wire.message import Numbers


@dataclass(frozen=True)
class Unique:
    """Strips of features that are read by id and pooled alike, one after the other: the vector of their id i is answer
    `segments_N[i]`.

    Attributes:
        how: what is the same for all batches: the strips, and how they pool.
        segments_N: -1 where a padding id stands in a bag. Bags of outputs that lie side by side stand sample by sample, but for
            those with weights.
        starts_B: where each bag begins.
        bags_of: the bags, or ids where none are pooled, of each segment, where that is known already.
    """

    how: IdGroup
    segments_N: torch.Tensor
    starts_B: torch.Tensor
    bags_of: BagsOf | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SlabRoute:
    """What one rank asks of one slab.

    Attributes:
        keys_E: keys grouped by owner.
        lengths_S: keys of each segment, or None when each has one.
        counts: segments and keys that go to each rank, int64 `[2, R]`, on the host.
        multiplicities_E: how often each key's id occurs, int32, or None where nobody wants to know.
        unique: how answers become outputs by id.
        bagged: (feature, strip) of those read by bag, in the slab's order.
        bag_segments: the answers that sum to each bag, one bag after the other; None where answer b is bag b. Bags of outputs
            that lie side by side stand sample by sample.
        bag_starts: where those of each bag begin, `[sum of bags]`; None likewise.
        bags_of: the bag of each segment, where that is known already.
    """

    keys_E: torch.Tensor
    lengths_S: torch.Tensor | None
    counts: Numbers
    multiplicities_E: torch.Tensor | None = None
    unique: tuple[Unique, ...] = ()
    bagged: tuple[tuple[int, int], ...] = ()
    bag_segments: torch.Tensor | None = None
    bag_starts: torch.Tensor | None = None
    bags_of: BagsOf | None = field(default=None, compare=False)

    @property
    def passes_on(self) -> bool:
        """Answers are bags as they are, and so are the gradients that come back."""
        return bool(self.bagged) and self.bag_segments is None


@dataclass(frozen=True)
class Route:
    """One batch's way to the owners and back: `combine` consumes it.

    Attributes:
        ids: the batch, without padding where that is left out before it is sent; on a GPU its bags' lengths leave it out, and not
            the ids.
        features: what is looked up, in the order of the outputs.
        slabs: what is asked of each.
        columns: how the outputs of those that pool lie side by side, or None where they do not.
        samples: rows of these; 0 where there are none.
    """

    ids: IdBatch
    features: tuple[Feature, ...]
    slabs: tuple[SlabRoute, ...]
    columns: Columns | None = None
    samples: int = 0

    def counts(self) -> Numbers:
        """Segments and keys that go to each rank, of all slabs, int64 `[slabs, 2, R]`."""
        return np.stack([slab.counts for slab in self.slabs])


def make_route(ids: IdBatch, features: Sequence[Feature], routing: RoutingTable) -> Route:
    """Decide what to ask of whom.

    Raises:
        IdRangeError: an id is negative or not below its table's num_embeddings.
    """
    lookup_plan = routing.lookup_plan(tuple(features), ids.weighted)
    samples = _samples(ids, lookup_plan.pooled)
    # Triton's routes know rows alone: those of ids are made in plain torch.
    at_once = triton.serves(ids.ids.device) and not routing.dynamic
    slab_routes = _all_at_once if at_once else _slab_by_slab
    ids, slabs = slab_routes(ids, features, routing, lookup_plan, samples)
    return Route(ids, tuple(features), slabs, None if samples is None else lookup_plan.pooled, samples or 0)


def _samples(ids: IdBatch, columns: Columns | None) -> int | None:
    """Of the features that pool, if all have as many."""
    found = set() if columns is None else {ids.bags[i] for i in columns.features}
    return found.pop() if len(found) == 1 else None


def _slab_by_slab(
    ids: IdBatch, features: Sequence[Feature], routing: RoutingTable, lookup_plan: LookupPlan, samples: int | None
) -> tuple[IdBatch, tuple[SlabRoute, ...]]:
    """The batch as `Route` has it, and what is asked of each slab."""
    _check_range(ids, features, routing, lookup_plan)
    ids = _drop_padding(ids, lookup_plan)
    distinct = find_distinct(ids, routing, lookup_plan)
    pairs = zip(routing.slabs, lookup_plan.slabs, strict=True)
    return ids, tuple(
        _slab_route(slab, ids, of_slab, distinct, lookup_plan.by_id, routing.world_size, samples) for slab, of_slab in pairs
    )


def _all_at_once(
    ids: IdBatch, features: Sequence[Feature], routing: RoutingTable, lookup_plan: LookupPlan, samples: int | None
) -> tuple[IdBatch, tuple[SlabRoute, ...]]:
    """The same on a device, of all slabs by as many calls as of one."""
    asked = ask_all(ids, lookup_plan, routing, samples)
    if asked is None:
        _check_range(ids, features, routing, lookup_plan)
    assert asked is not None, "kernels and check disagree on whether an id is outside of its table"
    slabs = tuple(
        SlabRoute(
            found.keys_E,
            found.lengths_S,
            found.counts,
            found.multiplicities_E,
            tuple(Unique(how, *pair, found.bags_of) for how, pair in zip(of_slab.by_id, found.unique, strict=True)),
            of_slab.bags,
            found.bag_segments,
            found.bag_starts,
            found.bags_of,
        )
        for found, of_slab in zip(asked, lookup_plan.slabs, strict=True)
    )
    return _without_padding_in_lengths(ids, lookup_plan), slabs


def _without_padding_in_lengths(ids: IdBatch, lookup_plan: LookupPlan) -> IdBatch:
    """The batch, with lengths that leave out padding in the features that are read by bag. Their ids stay: how many they are is
    known to the device alone.
    """
    if not lookup_plan.padded:
        return ids
    parts = list(ids.parts)
    for i, padding in lookup_plan.padded:
        parts[i] = parts[i]._replace(lengths=parts[i].lengths_without(padding))
    return replace(ids, parts=tuple(parts))


def empty_route(features: Sequence[Feature], routing: RoutingTable) -> Route:
    """A route that asks nothing, for a rank whose batch was refused."""
    nothing = np.zeros((2, routing.world_size), dtype=np.int64)
    slabs = tuple(SlabRoute(slab.blocks.new_empty(0), None, nothing) for slab in routing.slabs)
    return Route(IdBatch(torch.empty(0, dtype=torch.int64), ()), tuple(features), slabs)


def _multiplicities(found: Segments, of_slab: SlabLookupPlan, distinct: Distinct) -> torch.Tensor:
    """How often each key's id occurs, int32 `[E]`; in bags each key stands for one occurrence."""
    multiplicities_E = torch.ones(found.keys_E.numel(), dtype=torch.int32, device=found.keys_E.device)
    spans = [distinct.starts[table : table + 2].tolist() for table in of_slab.lanes[0].tolist()]
    occur = cat([distinct.counts_U[start:stop] for start, stop in spans], found.keys_E).to(torch.int32)
    entries = found.of_single
    if found.lengths_S is not None:
        ends_S = found.lengths_S.cumsum(0)
        entries = (ends_S - found.lengths_S)[entries]
    multiplicities_E[entries] = occur
    return multiplicities_E


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
        at = kernels.routing.first_outside(ids.ids.numpy(), ids.sizes_F, lookup_plan.rows)
        return None if at < 0 else at
    limits = of_features(lookup_plan.rows, ids)
    bad = ((ids.ids < 0) | (ids.ids >= limits)) & (limits > 0)
    return int(bad.nonzero()[0]) if bad.any() else None  # host sync on a GPU


def _drop_padding(ids: IdBatch, lookup_plan: LookupPlan) -> IdBatch:
    """The batch without padding in the features that are read by bag."""
    if not lookup_plan.padded:
        return ids
    parts = list(ids.parts)
    for i, padding in lookup_plan.padded:
        parts[i] = parts[i].without(padding)
    return IdBatch.join(tuple(parts))


def _slab_route(
    slab: SlabOwners,
    ids: IdBatch,
    of_slab: SlabLookupPlan,
    distinct: Distinct,
    by_id: Numbers,
    world_size: int,
    samples: int | None,
) -> SlabRoute:
    found = ask(slab, of_slab, ids, distinct, world_size, samples)
    multiplicities_E = _multiplicities(found, of_slab, distinct) if slab.spec.counts_ids else None
    return SlabRoute(
        found.keys_E,
        found.lengths_S,
        to_host(found.counts),  # host sync on a GPU
        multiplicities_E,
        tuple(Unique(how, *read(how, found, distinct, ids, by_id, samples)) for how in of_slab.by_id),
        of_slab.bags,
        found.bag_segments,
        found.bag_starts,
    )
