"""Ids to segments for all slabs at once: a fixed number of calls, whatever the number of tables, slabs and ranks.

Each feature's ids stand once for each lane that they are looked up in: a stream. All entries of all streams get one sort key each:

    | slab 0, rank 0: rows of lane 0, lane 1, ..., then bags | slab 0, rank 1: ... | slab 1, rank 0: ... | dropped | at fault

so that one stable sort puts together what goes to one owner, and of that what is the same row of a table that is read by id, or
stands in one bag. A running sum over the sorted entries then numbers segments and keys, and the numbers at the bounds of each
(slab, rank) are all that the host has to know.

Legend: E entries (an id in a stream), J streams, S segments, K keys, B bags, R ranks.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shardembed.kernels.host import to_device, to_host
from shardembed.kernels.triton.locate import locate, start_bags
from shardembed.kernels.triton.search import halvings, not_above
from shardembed.kernels.triton.streams import BATCH_LINES, SLAB, STREAM, Batch, Ways, bags_before, of_run, of_way, run_of
from shardembed.kernels.triton.tiles import launch
from shardembed.wire.message import Numbers

BLOCK = 1024
LOW = tl.constexpr(0xFFFFFFFF)  # of a running sum: segments; keys are counted above


@dataclass(frozen=True)
class Sorted:
    """The entries in the order in which they are asked for, and what that makes of them.

    Attributes:
        sort_keys: ascending, `[E]`.
        order: the entries, `[E]`.
        sums: segments, and keys above them, up to each, `[E]`.
        sent: the key of each entry, or its complement where it is read by bag, `[E]`, as they stood.
        bags: the place of the bag of each entry, its complement where that is padding, `[E]`, as they stood.
        starts: of each slot, where its bag begins among the entries that are used together.
        segments: in front of each (slab, rank), and all, `[slabs * R + 1]`.
        keys: likewise.
        singles: segments that are one row, of each (slab, rank), `[slabs * R]`.
        kept: entries that were neither dropped nor at fault.
        wrong: entries at fault.
        facts: what the kernels know of the batch.
        there: the running sums in front of each (slab, rank) and of its bags.
    """

    sort_keys: torch.Tensor
    order: torch.Tensor
    sums: torch.Tensor
    sent: torch.Tensor
    bags: torch.Tensor
    starts: torch.Tensor
    segments: Numbers
    keys: Numbers
    singles: Numbers
    kept: int
    wrong: int
    facts: torch.Tensor
    there: torch.Tensor


def sort_entries(ways: Ways, batch: Batch) -> Sorted:
    """Sort the entries of all streams, and count what goes to whom. Host sync on a GPU: counts, and whether an id is at fault."""
    device, (streams, _), entries = batch.ids.device, batch.counts, batch.entries
    total = ways.keys + ways.ranks * int(batch.bags.sum())
    facts = to_device(batch.facts(), device)
    starts = start_bags(batch, facts)
    sort_keys, sent, bag_E = locate(ways, batch, facts, starts, total)
    order = sums = sent
    if entries:
        sort_keys, order = torch.sort(sort_keys, stable=True)
        ones = torch.empty(entries, dtype=torch.int64, device=device)
        launch(_mark, -(-entries // BLOCK), ones, sort_keys, order, sent, entries, total, BLOCK=BLOCK)
        sums = ones.cumsum(0)
    groups = ways.slabs * ways.ranks
    there = torch.empty(2 * groups + 3, dtype=torch.int64, device=device)
    launch(
        _bound, -(-(2 * groups + 3) // BLOCK), there, sort_keys, sums, facts, ways.rows, streams, entries, ways.slabs, ways.ranks,
        total, halvings(entries), BLOCK=BLOCK,
    )  # fmt: skip
    told = to_host(there)
    segments, keys = told[: 2 * groups + 1] & LOW.value, told[: 2 * groups + 1 : 2] >> 32
    singles = segments[1::2] - segments[:-1:2]
    return Sorted(
        sort_keys,
        order,
        sums,
        sent,
        bag_E,
        starts,
        segments[::2],
        keys,
        singles,
        int(told[-2]),
        entries - int(told[-1]),
        facts,
        there,
    )


@dataclass(frozen=True)
class Segments:
    """What is asked, of all slabs one after the other, by rank.

    Attributes:
        keys_K: in each dtype that was asked for.
        starts: where each segment's keys begin, and the end, int32 `[S + 1]`.
        entries: where each segment's entries begin in the sorted order, and the end, int32 `[S + 1]`.
        segment_E: of each entry its segment in its slab, -1 for padding in bags that are pooled by id, int64 `[E]`.
        bag_E: of each entry in the sorted order the place of its bag, int32 `[E]`.
        bag_S: of each segment its bag, all slabs' numbered through; behind all of them for what is a single row, int32 `[S]`.
    """

    keys_K: dict[torch.dtype, torch.Tensor]
    starts: torch.Tensor
    entries: torch.Tensor
    segment_E: torch.Tensor
    bag_E: torch.Tensor
    bag_S: torch.Tensor


def cut_segments(ways: Ways, batch: Batch, found: Sorted, key_dtypes: set[torch.dtype]) -> Segments:
    """Write down what `sort_entries` has counted. Waits for nothing."""
    device, (streams, runs) = batch.ids.device, batch.counts
    entries, segments, keys = found.sent.numel(), int(found.segments[-1]), int(found.keys[-1])
    keys_K = {dtype: torch.empty(keys, dtype=dtype, device=device) for dtype in key_dtypes}
    starts, places = torch.empty(2, segments + 1, dtype=torch.int32, device=device).unbind(0)
    segment_E = torch.empty(entries, dtype=torch.int64, device=device)
    bag_E, bag_S = torch.empty_like(found.bags), torch.empty(segments, dtype=torch.int32, device=device)
    launch(
        _cut, -(-(entries + 1) // BLOCK), keys_K.get(torch.int32, segment_E), keys_K.get(torch.int64, segment_E), starts, places,
        segment_E, bag_E, bag_S, found.sort_keys, found.order, found.sums, found.sent, found.bags, found.facts, found.there,
        ways.streams, streams, runs, found.kept, segments, keys, ways.slabs, ways.ranks, halvings(runs),
        NARROW=torch.int32 in key_dtypes, WIDE=torch.int64 in key_dtypes, BLOCK=BLOCK,
    )  # fmt: skip
    return Segments(keys_K, starts, places, segment_E, bag_E, bag_S)


def segments_of_bags(ways: Ways, batch: Batch, found: Sorted, asked: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """The segments of each bag, in its slab, one bag after the other, slab by slab; and where each bag's begin in its slab's."""
    (streams, _), bags = batch.counts, int(batch.bags.sum())
    count = int(found.segments[-1] - found.singles.sum())
    bag_S, order_S = torch.sort(asked.bag_S, stable=True)
    segments = torch.empty(count, dtype=torch.int64, device=bag_S.device)
    starts = torch.empty(bags, dtype=torch.int64, device=bag_S.device)
    launch(
        _list_bags, -(-max(count, bags) // BLOCK), segments, starts, bag_S, order_S, found.facts, found.there, streams, count, bags,
        ways.slabs, ways.ranks, halvings(ways.slabs), halvings(count), BLOCK=BLOCK,
    )  # fmt: skip
    return segments, starts


@triton.jit
def _begins(sort_keys, entry, live):
    """Whether each of the sorted entries is the first with its sort key."""
    here = tl.load(sort_keys + entry, mask=live, other=0)
    before = tl.load(sort_keys + entry - 1, mask=live & (entry > 0), other=-1)
    return live & (here != before)


@triton.jit(do_not_specialize=["entries", "total"])
def _mark(ones, sort_keys, order, sent, entries, total, BLOCK: tl.constexpr):
    """1 for a segment that begins, 2^32 for a key to send: all of a bag, and of equal rows the first."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < entries
    kept = live & (tl.load(sort_keys + entry, mask=live, other=0) < total)
    begins = _begins(sort_keys, entry, kept)
    bagged = tl.load(sent + tl.load(order + entry, mask=kept, other=0), mask=kept, other=0) < 0
    told = begins | (bagged & kept)
    tl.store(ones + entry, begins.to(tl.int64) + (told.to(tl.int64) << 32), mask=live)


@triton.jit(do_not_specialize=["streams", "entries", "slabs", "ranks", "total", "halvings"])
def _bound(there, sort_keys, sums, facts, rows, streams, entries, slabs, ranks, total, halvings, BLOCK: tl.constexpr):
    """The running sum in front of each (slab, rank)'s rows and of its bags, and behind all; how many entries that is, and how many
    are not at fault.
    """
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    groups = slabs * ranks
    live = item < 2 * groups + 3
    inner = item < 2 * groups
    group = tl.where(inner, item // 2, 0)
    slab = group // ranks
    limit = tl.load(rows + (item % 2) * groups + group, mask=inner, other=0)
    limit += bags_before(facts, slab, group - slab * ranks, streams, slabs, ranks, inner)
    limit = tl.where(inner, limit, total + (item == 2 * groups + 2).to(tl.int64))
    count = not_above(sort_keys, 0, entries, limit - 1, live, halvings)
    summed = tl.load(sums + count - 1, mask=live & (count > 0), other=0)
    tl.store(there + item, tl.where(item <= 2 * groups, summed, count), mask=live)


@triton.jit(do_not_specialize=["streams", "runs", "kept", "segments", "keys", "slabs", "ranks", "halvings"])
def _cut(
    keys_32, keys_64, starts, places, segment_E, sorted_bags, bag_S, sort_keys, order, sums, sent, bag_E, facts, there, ways,
    streams, runs, kept, segments, keys, slabs, ranks, halvings, NARROW: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keys and segments where they are to stand. The item behind the last entry that is kept ends the last segment."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = item < kept
    entry = tl.load(order + item, mask=live, other=0)
    run = run_of(facts, entry, streams, runs, slabs, live, halvings)
    stream = of_run(facts, STREAM, run, streams, runs, slabs, live)  # any of the run, which lie in one slab
    slab = of_way(ways, SLAB, stream, streams, live)
    summed = tl.load(sums + item, mask=live, other=0)
    segment = (summed & LOW) - 1
    key_number = (summed >> 32) - 1
    key = tl.load(sent + entry, mask=live, other=0)
    bagged = key < 0
    begins = _begins(sort_keys, item, live)
    told = begins | (bagged & live)
    key = tl.where(bagged, ~key, key)
    if NARROW:
        tl.store(keys_32 + key_number, key.to(tl.int32), mask=told)
    if WIDE:
        tl.store(keys_64 + key_number, key, mask=told)

    end = item == kept
    tl.store(starts + tl.where(end, segments, segment), tl.where(end, keys, key_number).to(tl.int32), mask=begins | end)
    tl.store(places + tl.where(end, segments, segment), item.to(tl.int32), mask=begins | end)
    lines = facts + BATCH_LINES * (streams + 1)
    placed = tl.load(bag_E + entry, mask=live, other=0)
    padding = placed < 0
    placed = tl.where(padding, ~placed, placed)
    tl.store(sorted_bags + item, placed, mask=live)
    bag = placed + tl.load(lines + slab, mask=live, other=0)
    all_bags = tl.load(lines + slabs)
    tl.store(bag_S + segment, tl.where(bagged, bag, all_bags).to(tl.int32), mask=begins)
    base = tl.load(there + 2 * slab * ranks, mask=live, other=0) & LOW
    tl.store(segment_E + entry, tl.where(padding, -1, segment - base), mask=live)


@triton.jit(do_not_specialize=["streams", "count", "bags", "slabs", "ranks", "halvings", "segment_halvings"])
def _list_bags(
    segments,
    starts,
    bag_S,
    order_S,
    facts,
    there,
    streams,
    count,
    bags,
    slabs,
    ranks,
    halvings,
    segment_halvings,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lines = facts + BATCH_LINES * (streams + 1)
    live = item < count
    bag = tl.load(bag_S + item, mask=live, other=0).to(tl.int64)
    slab = not_above(lines, 0, slabs, bag, live, halvings) - 1
    base = tl.load(there + 2 * slab * ranks, mask=live, other=0) & LOW
    tl.store(segments + item, tl.load(order_S + item, mask=live, other=0) - base, mask=live)

    live = item < bags
    slab = not_above(lines, 0, slabs, item, live, halvings) - 1
    first_bag = tl.load(lines + slab, mask=live, other=0)
    first = not_above(bag_S, 0, count, first_bag - 1, live, segment_halvings)
    here = not_above(bag_S, 0, count, item - 1, live, segment_halvings)
    tl.store(starts + item, here - first, mask=live)
