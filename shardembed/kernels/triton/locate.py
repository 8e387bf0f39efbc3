"""Where each entry of a batch's streams goes: owner, key and bag, and the sort key that brings together what belongs together."""

import torch
import triton
import triton.language as tl

from shardembed.kernels.triton.search import halvings, not_above
from shardembed.kernels.triton.streams import (
    APART,
    BAG,
    BAGGED,
    BLOCKS,
    ENTRY,
    FIRST_BLOCK,
    ID,
    ITEM,
    LENGTH,
    PADDING,
    PLACE,
    RAGGED,
    RESET,
    RESET_SLOT,
    ROWS,
    RUN_BASE,
    RUN_PLACES,
    RUN_SLOT,
    SLAB,
    SLOT,
    SLOT_STEP,
    START,
    STEP,
    STREAM,
    STRIDE,
    UNIFORM,
    Batch,
    Ways,
    bags_before,
    of_batch,
    of_run,
    of_way,
    run_of,
)
from shardembed.kernels.triton.tiles import launch

BLOCK = 1024
INT32 = torch.iinfo(torch.int32).max


def start_bags(batch: Batch, facts: torch.Tensor) -> torch.Tensor:
    """Of each slot, where its bag begins."""
    (streams, _), items = batch.counts, int(batch.streams[ITEM.value, -1])
    ones = torch.empty(batch.slots, dtype=torch.int64, device=batch.ids.device)
    if not items:
        return ones
    launch(_measure, -(-items // BLOCK), ones, batch.lengths, facts, streams, items, halvings(streams), BLOCK=BLOCK)
    return ones.cumsum(0)


def locate(
    ways: Ways, batch: Batch, facts: torch.Tensor, starts: torch.Tensor, total: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each entry its sort key, below `total` but for what is dropped or at fault; its key, or the complement of that where it is
    read by bag; and the place of its bag, or the complement where it is padding.
    """
    device, (streams, runs), entries = batch.ids.device, batch.counts, batch.entries
    sort_keys = torch.empty(entries, dtype=torch.int32 if total + 1 <= INT32 else torch.int64, device=device)
    sent = torch.empty(entries, dtype=torch.int64, device=device)
    bag_E = torch.empty(entries, dtype=torch.int32, device=device)
    ends = batch.lengths.cumsum(0) if batch.lengths.numel() else batch.lengths
    if entries:
        launch(
            _locate, -(-entries // BLOCK), sort_keys, sent, bag_E, batch.ids, ends, starts, facts, ways.streams, ways.blocks,
            ways.rows, streams, runs, entries, ways.blocks.shape[1], ways.slabs, ways.ranks, total, halvings(runs),
            halvings(ways.deepest), halvings(batch.deepest), BLOCK=BLOCK,
        )  # fmt: skip
    return sort_keys, sent, bag_E


@triton.jit(do_not_specialize=["streams", "items", "halvings"])
def _measure(ones, lengths, facts, streams, items, halvings, BLOCK: tl.constexpr):
    """The lengths of bags into the slots behind theirs. Item 0 of a stream is none of its bags."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = item < items
    stream = not_above(facts, ITEM * (streams + 1), streams, item, live, halvings) - 1
    bag = item - of_batch(facts, ITEM, stream, streams, live) - 1
    length = of_batch(facts, LENGTH, stream, streams, live)
    ragged = live & (bag >= 0) & (length < 0)
    differing = tl.load(lengths + of_batch(facts, RAGGED, stream, streams, live) + bag, mask=ragged, other=0)
    slot = of_batch(facts, SLOT, stream, streams, live) + bag * of_batch(facts, SLOT_STEP, stream, streams, live)
    tl.store(ones + slot + 1, tl.where(ragged, differing, length), mask=live & (bag >= 0))
    reset = of_batch(facts, RESET_SLOT, stream, streams, live)
    tl.store(ones + reset, of_batch(facts, RESET, stream, streams, live), mask=live & (bag < 0) & (reset >= 0))


@triton.jit
def _ends_before(ends, number, live):
    return tl.load(ends + number - 1, mask=live & (number > 0), other=0)


@triton.jit(
    do_not_specialize=[
        "streams", "runs", "entries", "blocks_count", "slabs", "ranks", "total", "halvings", "block_halvings", "bag_halvings",
    ]
)  # fmt: skip
def _locate(
    sort_keys, sent, bag_E, ids, ends, starts, facts, ways, blocks, rows, streams, runs, entries, blocks_count, slabs, ranks, total,
    halvings, block_halvings, bag_halvings, BLOCK: tl.constexpr,
):  # fmt: skip
    """Owner, key and bag of each entry."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < entries
    run = run_of(facts, entry, streams, runs, slabs, live, halvings)
    within = entry - of_run(facts, ENTRY, run, streams, runs, slabs, live)
    # Which bag of the run, and which id of that.
    uniform = of_run(facts, UNIFORM, run, streams, runs, slabs, live)
    uneven = live & (uniform < 0)
    first_slot = of_run(facts, RUN_SLOT, run, streams, runs, slabs, live)
    from_base = within + of_run(facts, RUN_BASE, run, streams, runs, slabs, live)
    places = tl.where(uneven, of_run(facts, RUN_PLACES, run, streams, runs, slabs, live), 0)
    place = not_above(starts, first_slot, places, from_base, uneven, bag_halvings) - 1
    place = tl.where(uneven, place, within // tl.maximum(uniform, 1))
    begin = tl.where(uneven, tl.load(starts + first_slot + place, mask=uneven, other=0), place * uniform)
    number = tl.where(uneven, from_base, within) - begin
    # Which bag of its stream.
    apart = tl.maximum(of_run(facts, APART, run, streams, runs, slabs, live), 1)
    bag = place // apart
    stream = of_run(facts, STREAM, run, streams, runs, slabs, live) + place - bag * apart
    length = of_batch(facts, LENGTH, stream, streams, live)
    first_bag = of_batch(facts, RAGGED, stream, streams, live)
    ragged = live & (length < 0)
    before = tl.where(ragged, _ends_before(ends, first_bag + bag, ragged) - _ends_before(ends, first_bag, ragged), bag * length)
    row = tl.load(ids + of_batch(facts, ID, stream, streams, live) + before + number, mask=live, other=0)
    placed = of_batch(facts, PLACE, stream, streams, live) + bag * of_batch(facts, STEP, stream, streams, live)
    bag += of_batch(facts, BAG, stream, streams, live)

    count = of_way(ways, ROWS, stream, streams, live)
    wrong = live & ((row < 0) | (row >= count))
    bagged = of_way(ways, BAGGED, stream, streams, live) > 0
    padding = live & (row == of_way(ways, PADDING, stream, streams, live))
    dropped = bagged & padding
    known = live & ~wrong
    tl.store(bag_E + entry, tl.where(padding, ~placed, placed).to(tl.int32), mask=live)

    stride = tl.maximum(of_way(ways, STRIDE, stream, streams, live), 1)
    residue = row % stride
    base = count // stride
    place = tl.where(stride > 1, residue * base + tl.minimum(residue, count - base * stride) + row // stride, row)
    position = place + of_way(ways, START, stream, streams, live)
    first_block = of_way(ways, FIRST_BLOCK, stream, streams, live)
    lane_blocks = of_way(ways, BLOCKS, stream, streams, live)
    block = first_block + not_above(blocks, first_block, lane_blocks, position, known, block_halvings) - 1
    owner = tl.load(blocks + blocks_count + block, mask=known, other=0)
    key = position + tl.load(blocks + 2 * blocks_count + block, mask=known, other=0)
    tl.store(sent + entry, tl.where(bagged, ~key, key), mask=live)

    slab = of_way(ways, SLAB, stream, streams, live)
    of_row = tl.load(blocks + 3 * blocks_count + block, mask=known, other=0) + row
    of_bag = tl.load(rows + slabs * ranks + slab * ranks + owner, mask=known, other=0) + bag
    sort_key = tl.where(bagged, of_bag, of_row) + bags_before(facts, slab, owner, streams, slabs, ranks, known)
    sort_key = tl.where(wrong, total + 1, tl.where(dropped, total, sort_key))
    tl.store(sort_keys + entry, sort_key.to(sort_keys.dtype.element_ty), mask=live)
