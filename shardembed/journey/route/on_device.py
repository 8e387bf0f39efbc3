"""Stage 2 on a GPU: all slabs are routed together by the kernels of `kernels.triton.routing`, so that the number of calls depends
on neither tables, slabs nor ranks, and the host waits once, for the counts that it must tell the other ranks anyway. The route is
the one that `entries` makes slab by slab, number for number.

Legend: E entries, J streams, S segments, B bags, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.inputs.ids import IdBatch
from shardembed.journey.route.ownership import LookupPlan, RoutingTable
from shardembed.kernels.host import to_device, to_host
from shardembed.kernels.pooling import BagsOf
from shardembed.tables.pooling import POOLINGS
from shardembed.wire.message import Numbers

if TYPE_CHECKING:  # since Triton may be absent
    from shardembed.kernels.triton.streams import Batch, Ways

FAR = 1 << 32  # more than there are lanes


class Unit(NamedTuple):
    """Streams whose entries are used together: those of an `IdGroup`, or what is read by bag in a slab.

    Attributes:
        first: of the streams.
        end: behind the last.
        pooled: by id.
        bagged: read by bag.
        weighted: ids have weights.
    """

    first: int
    end: int
    pooled: bool
    bagged: bool
    weighted: bool


@dataclass(frozen=True)
class Streams:
    """Who the streams are, slab by slab: what is read by id, group by group, then what is read by bag.

    Attributes:
        lines: as in `streams.Ways.streams`.
        features: of each, int64 `[J]`.
        units: of each slab, of which the last one is read by bag.
    """

    lines: Numbers
    features: Numbers
    units: tuple[tuple[Unit, ...], ...]

    @staticmethod
    def of(lookup_plan: LookupPlan, routing_table: RoutingTable) -> Streams:
        lines: list[tuple[int, ...]] = []
        features: list[int] = []
        units: list[tuple[Unit, ...]] = []
        padding_of, before = dict(lookup_plan.padded), 0
        for number, (slab, of_slab) in enumerate(zip(routing_table.slabs, lookup_plan.slabs, strict=True)):
            found: list[Unit] = []
            for group in of_slab.by_id:
                columns = [(f, of_slab.lanes[:, lane].tolist(), padding) for f, lane, padding in group.strips.T.tolist()]
                pooled = POOLINGS[group.pooling].over_ids is not None
                found.append(Unit(len(features), len(features) + len(columns), pooled, False, group.weighted))
                features += [feature for feature, _, _ in columns]
                lines += [(number, *_of_lane(lane, before), padding, 0) for _, lane, padding in columns]
            by_bag = of_slab.bag_lanes.T.tolist()
            found.append(Unit(len(features), len(features) + len(by_bag), False, True, False))
            features += [lane[0] for lane in by_bag]
            lines += [(number, *_of_lane(lane, before), padding_of.get(lane[0], -1), 1) for lane in by_bag]
            units.append(tuple(found))
            before += slab.blocks.shape[1]
        columns = np.array(lines, dtype=np.int64).reshape(-1, 8).T.copy()
        return Streams(columns, np.array(features, dtype=np.int64), tuple(units))

    @cached_property
    def unit_firsts(self) -> Numbers:
        """Of each the first one of its unit."""
        return self._each([unit.first for unit in self._all])

    @cached_property
    def unit_sizes(self) -> Numbers:
        """Of each how many its unit has."""
        return self._each([unit.end - unit.first for unit in self._all])

    @cached_property
    def pooled(self) -> NDArray[np.bool_]:
        return self._each([unit.pooled for unit in self._all]) > 0

    @cached_property
    def bagged(self) -> NDArray[np.bool_]:
        return self._each([unit.bagged for unit in self._all]) > 0

    @cached_property
    def by_sample(self) -> NDArray[np.bool_]:
        """Of each whether its bags can stand sample by sample; the others' stand stream by stream, as their weights do."""
        return (self.pooled & (self._each([unit.weighted for unit in self._all]) == 0)) | self.bagged

    @property
    def _all(self) -> list[Unit]:
        return [unit for units in self.units for unit in units]

    def _each(self, numbers: Sequence[int]) -> Numbers:
        return np.repeat(np.array(numbers, dtype=np.int64), [unit.end - unit.first for unit in self._all])


@dataclass(frozen=True)
class DevicePlan:
    """How features are read, as the kernels take it: worked out once.

    Attributes:
        streams: who they are.
        ways: where they lead.
    """

    streams: Streams
    ways: Ways

    @staticmethod
    def of(lookup_plan: LookupPlan, routing_table: RoutingTable, device: torch.device) -> DevicePlan:
        from shardembed.kernels.triton.streams import BLOCKS, Ways

        streams = Streams.of(lookup_plan, routing_table)
        blocks, rows, keys = _sort_keys(routing_table, lookup_plan, streams)
        deepest = int(streams.lines[BLOCKS.value].max(initial=0))
        lines, there, bounds = (to_device(part, device) for part in (streams.lines, blocks, rows))
        slabs, ranks = len(routing_table.slabs), routing_table.world_size
        return DevicePlan(streams, Ways(lines, there, bounds, keys, slabs, ranks, deepest))


def _of_lane(lane: Sequence[int], blocks_before: int) -> tuple[int, ...]:
    """First position, stride and rows; first block of all slabs' and number of blocks."""
    _, start, stride, rows, _, first_block, blocks = lane
    return start, stride, rows, blocks_before + first_block, blocks


def _sort_keys(routing_table: RoutingTable, lookup_plan: LookupPlan, streams: Streams) -> tuple[Numbers, Numbers, int]:
    """Rows of a lane that one rank answers have neighbouring sort keys, in their order.

    Returns:
        (the blocks of all slabs, and what makes a row its sort key `[4, blocks]`; where the sort keys of each (slab, rank) begin
        and end `[2, slabs * R]`; how many there are).
    """
    ranks, slabs = routing_table.world_size, routing_table.slabs
    wanted = set(streams.lines[4, ~streams.bagged].tolist())  # the lanes that anything is read by id of, by their first blocks
    blocks = np.concatenate([to_host(slab.blocks) for slab in slabs], axis=1)
    found: list[Numbers] = []  # of the blocks of a lane: whose they are, their numbers, first and last rows
    before = 0
    for number, (slab, of_slab) in enumerate(zip(slabs, lookup_plan.slabs, strict=True)):
        for at, (_, start, stride, rows, _, first, count) in enumerate(of_slab.lanes.T.tolist()):
            if before + first in wanted:
                mine = np.arange(before + first, before + first + count)
                low = blocks[0, mine] - start
                high = np.append(low[1:], rows)
                if stride > 1:  # rows of a block are spread over the table
                    low, high = np.zeros_like(low), np.full_like(high, rows)
                found.append(np.stack([(number * ranks + blocks[1, mine]) * FAR + at, mine, low, high]))
        before += slab.blocks.shape[1]
    base, bounds = np.zeros_like(blocks[0]), np.zeros(len(slabs) * ranks + 1, dtype=np.int64)
    if found:
        code, mine, low, high = np.concatenate(found, axis=1)
        distinct, inverse = np.unique(code, return_inverse=True)
        first, last = np.full(distinct.size, np.iinfo(np.int64).max), np.zeros(distinct.size, np.int64)
        np.minimum.at(first, inverse, low)
        np.maximum.at(last, inverse, high)
        ends = np.cumsum(last - first)
        base[mine] = (ends - last)[inverse]
        bounds = np.append(0, ends)[np.searchsorted(distinct, np.arange(bounds.size) * FAR)]
    return np.vstack([blocks, base]), np.stack([bounds[:-1], bounds[1:]]), int(bounds[-1])


class Streamed(NamedTuple):
    """The batch as streams, and what the host knows of it.

    Attributes:
        batch: as the kernels take it.
        entries: the first of each stream, and the end `[J + 1]`; of those that stand sample by sample the first of all.
        slots: where the starts of the bags of each stream begin `[J]`.
        bags: of each stream `[J]`.
        by_sample: bags of a slab that are listed stand sample by sample.
    """

    batch: Batch
    entries: Numbers
    slots: Numbers
    bags: Numbers
    by_sample: bool


def batch_of(ids: IdBatch, streams: Streams, slabs: int, samples: int | None) -> Streamed:
    """samples: the bags of each feature that pools, where they are to stand sample by sample."""
    from shardembed.kernels.triton.streams import ENTRY, ITEM, SLAB, Batch

    ragged = [i for i, part in enumerate(ids.parts) if isinstance(part.lengths, torch.Tensor)]
    lengths = [part.lengths for part in ids.parts if isinstance(part.lengths, torch.Tensor)]
    uniform = np.array([-1 if isinstance(part.lengths, torch.Tensor) else part.lengths for part in ids.parts], dtype=np.int64)
    begins = np.zeros(len(ids.parts), dtype=np.int64)
    begins[ragged] = _before(ids.bags_F[ragged])
    of, first, pooled, bagged = streams.features, streams.unit_firsts, streams.pooled, streams.bagged
    numbers, has_bags = np.arange(of.size), pooled | bagged
    sizes, length = ids.sizes_F[of], np.where(has_bags, uniform[of], 1)
    bags = np.where(has_bags, ids.bags_F[of], 0)
    sided = streams.by_sample & bool(samples)
    merged = sided & pooled  # several streams in one run
    run_firsts = np.flatnonzero(~merged | (numbers == first))
    entries, in_unit = _before(sizes), _before(np.where(has_bags, bags, sizes))
    in_unit = in_unit - in_unit[first]
    of_slabs = np.bincount(streams.lines[SLAB.value, bagged], bags[bagged], minlength=slabs).astype(np.int64)

    slotted = pooled | (bagged & (length < 0))
    opens = slotted & (bagged | (numbers == first))  # a reset stands in front
    slots_each = np.where(slotted, bags, 0) + opens
    slots = _before(slots_each) - (slotted & ~opens)
    slots = np.where(merged, slots[first] + numbers - first, slots)
    totals = np.diff(np.append(_before(np.where(slotted, sizes, 0))[opens], sizes[slotted].sum()))
    reset = np.zeros_like(of)
    reset[opens] = -np.append(0, totals[:-1])[: totals.size]
    step = np.where(sided, streams.unit_sizes, 1)
    lines = [
        _before(ids.sizes_F)[of],
        in_unit,
        np.where(sided, numbers - first, in_unit),
        step,
        length,
        begins[of],
        slots,
        np.where(merged, step, 1),
        _before(np.where(slotted, bags + 1, 0)),
        reset,
        np.where(opens, slots, -1),
    ]
    ends = np.zeros((len(lines), 1), dtype=np.int64)
    ends[ITEM.value] = np.where(slotted, bags + 1, 0).sum()

    def of_runs(what: np.ufunc, each: Numbers) -> Numbers:
        return what.reduceat(each, run_firsts) if run_firsts.size else each

    same = of_runs(np.minimum, length) == of_runs(np.maximum, length)
    places, base = of_runs(np.add, bags), entries - entries[first]
    apart = np.diff(np.append(run_firsts, of.size))
    slot_base = np.where(bagged, 0, base)[run_firsts]
    runs = [entries[run_firsts], run_firsts, apart, np.where(same, length[run_firsts], -1), slots[run_firsts], places, slot_base]
    run_ends = np.zeros((len(runs), 1), dtype=np.int64)
    run_ends[ENTRY.value] = sizes.sum()
    batch = Batch(
        ids.ids,
        (torch.cat(lengths) if len(lengths) > 1 else lengths[0]) if lengths else ids.ids[:0],
        np.column_stack([np.stack(lines), ends]),
        np.column_stack([np.stack(runs), run_ends]),
        of_slabs,
        int(slots_each.sum()),
        int(places.max(initial=0)),
    )
    return Streamed(batch, np.append(entries, sizes.sum()), slots, bags, bool(samples))


def _before(numbers: Numbers) -> Numbers:
    return np.cumsum(numbers) - numbers


class Asked(NamedTuple):
    """What one slab is asked, as in `SlabRoute`.

    Attributes:
        keys_E: grouped by owner.
        lengths_S: keys of each segment, or None when each has one.
        counts: segments and keys that go to each rank, int64 `[2, R]`.
        multiplicities_E: how often each key's id occurs, or None.
        unique: of each `IdGroup` the segment of each id, and where each bag begins.
        bag_segments: the segments of each bag, or None.
        bag_starts: where those of each bag begin, or None.
        bags_of: which bags each segment is in, where the slab is read in one way alone.
    """

    keys_E: torch.Tensor
    lengths_S: torch.Tensor | None
    counts: Numbers
    multiplicities_E: torch.Tensor | None
    unique: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    bag_segments: torch.Tensor | None
    bag_starts: torch.Tensor | None
    bags_of: BagsOf | None


def ask_all(ids: IdBatch, lookup_plan: LookupPlan, routing_table: RoutingTable, samples: int | None) -> list[Asked] | None:
    """What to ask of each slab; None where an id is outside of its table. Host sync on a GPU.

    samples: as in `batch_of`.
    """
    from shardembed.kernels.triton import routing

    plan = lookup_plan.on_device.get(ids.ids.device)
    if plan is None:
        plan = lookup_plan.on_device[ids.ids.device] = DevicePlan.of(lookup_plan, routing_table, ids.ids.device)
    streamed = batch_of(ids, plan.streams, len(routing_table.slabs), samples)
    found = routing.sort_entries(plan.ways, streamed.batch)
    if found.wrong:
        return None
    dtypes = {slab.spec.key_dtype for slab in routing_table.slabs}
    asked = routing.cut_segments(plan.ways, streamed.batch, found, dtypes)
    lengths = asked.starts.diff() if streamed.batch.bags.any() else asked.starts
    shape = len(routing_table.slabs), routing_table.world_size
    segments, keys = np.diff(found.segments).reshape(shape), np.diff(found.keys).reshape(shape)
    singles, bags = found.singles.reshape(shape).sum(1), streamed.batch.bags
    of_bags = segments.sum(1) - singles
    moves = []
    for number, (slab, of_slab) in enumerate(zip(routing_table.slabs, lookup_plan.slabs, strict=True)):
        stays = slab.lone_owner is not None and not (singles[number] and bags[number]) and of_bags[number] == bags[number]
        moves.append(bool(bags[number]) and not (stays and (not streamed.by_sample or len(of_slab.bags) == 1)))
    listed = routing.segments_of_bags(plan.ways, streamed.batch, found, asked) if any(moves) else None
    places_S = asked.bag_E.index_select(0, asked.entries[:-1]) if bags.any() else asked.bag_E
    found_slabs = []
    first_segments, first_keys = np.append(0, np.cumsum(segments.sum(1))), np.append(0, np.cumsum(keys.sum(1)))
    first_listed, first_bags = np.append(0, np.cumsum(of_bags)), np.append(0, np.cumsum(bags))
    for number, slab in enumerate(routing_table.slabs):
        of_keys = slice(first_keys[number], first_keys[number + 1])
        of_segments = slice(first_segments[number], first_segments[number + 1])
        with_end = slice(first_segments[number], first_segments[number + 1] + 1)
        unique = tuple(_unique(unit, streamed, asked.segment_E, found.starts) for unit in plan.streams.units[number][:-1])
        bags_of = None  # where a slab is read in one way alone
        if len(unique) + bool(bags[number]) == 1:
            bags_of = BagsOf(places_S[of_segments], None) if bags[number] else BagsOf(asked.bag_E, asked.entries[with_end])
        scaled = slab.spec.policy.scale_grad_by_freq
        pair: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
        if listed is not None and moves[number]:
            pair = (
                listed[0][first_listed[number] : first_listed[number + 1]],
                listed[1][first_bags[number] : first_bags[number + 1]],
            )
        found_slabs.append(
            Asked(
                asked.keys_K[slab.spec.key_dtype][of_keys],
                lengths[of_segments] if bags[number] else None,
                np.stack([segments[number], keys[number]]),
                asked.entries[with_end].diff() if scaled else None,
                unique,
                *pair,
                bags_of,
            )
        )
    return found_slabs


def _unique(unit: Unit, streamed: Streamed, segment_E: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    segments_N = segment_E[streamed.entries[unit.first] : streamed.entries[unit.end]]
    if not unit.pooled:
        return segments_N, segment_E[:0]
    slot = int(streamed.slots[unit.first])
    return segments_N, starts[slot : slot + int(streamed.bags[unit.first : unit.end].sum())]
