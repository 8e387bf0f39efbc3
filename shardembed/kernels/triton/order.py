"""Where each row's duplicates are: a stable sort of the entries by row, made before any gradient is there, for all slabs at once.

Rows of all slabs are numbered through and sorted together, so the number of calls does not depend on how many slabs there are; each
slab gets its part of the arrays, with numbers of its own.

Legend: E entries, S segments, U distinct rows (known to the device only), P pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from shardembed.kernels.host import to_device
from shardembed.kernels.triton.search import halvings, not_above
from shardembed.kernels.triton.tiles import Tile, launch

DIRECT = 64  # duplicates that one program sums by itself, at most
LEAST_DIRECT = 8
SHARED = 256  # vectors that a tile goes through for its longest run, most of them masked where the others are short
BLOCK = 1024
MOST_DOUBLINGS = tl.constexpr(20)
INT32 = torch.iinfo(torch.int32).max


@dataclass(frozen=True)
class Asked:
    """The entries of one slab.

    Attributes:
        rows_E: their rows, int64.
        offsets: where each segment's entries begin, int64 `[S + 1]`, or None when each has one.
        rows: of the slab.
        direct: the longest run that is not cut (`direct_of`).
    """

    rows_E: torch.Tensor
    offsets: torch.Tensor | None
    rows: int
    direct: int = DIRECT


@dataclass(frozen=True)
class Pieces:
    """Long runs, cut so that many programs sum them.

    Attributes:
        begins: the first sorted entry of each piece, `[P']` for a bound P' of P.
        ends: behind the last one, `[P']`.
        starts: where each run's pieces begin, `[U' + 1]`; a short run has none.
        count: P, `[1]`; it stays on the device.
    """

    begins: torch.Tensor
    ends: torch.Tensor
    starts: torch.Tensor
    count: torch.Tensor


@dataclass(frozen=True)
class Order:
    """Entries sorted by row, those of a row in the order of arrival: a run.

    Attributes:
        rows_E: the rows of the entries.
        segments_E: their segments, whose gradients they get.
        starts: where each run begins, `[U' + 1]` for a bound U' of U; E from U on.
        count: U, `[1]`; it stays on the device.
        pieces: the long runs, cut; None where no run can be long.
    """

    rows_E: torch.Tensor
    segments_E: torch.Tensor
    starts: torch.Tensor
    count: torch.Tensor
    pieces: Pieces | None

    @property
    def bound(self) -> int:
        """At most so many distinct rows."""
        return self.starts.numel() - 1


def direct_of(width: int) -> int:
    """The longest run that is not cut, of rows so wide. Narrow rows share a tile, which takes as long as its longest run: there
    runs are cut sooner. What a sum is depends on it, so it depends on nothing but the width.
    """
    return max(LEAST_DIRECT, min(DIRECT, SHARED // Tile.of(width).many))


def order(rows_E: torch.Tensor, offsets: torch.Tensor | None, rows: int, direct: int = DIRECT) -> Order:
    """`orders` of one slab."""
    return orders([Asked(rows_E, offsets, rows, direct)])[0]


def orders(asked: Sequence[Asked]) -> list[Order]:
    """Sort the entries of each slab by their row. Waits for nothing."""
    # Read by their addresses.
    asked = [Asked(slab.rows_E.contiguous(), _contiguous(slab.offsets), slab.rows, slab.direct) for slab in asked]
    device, slabs = asked[0].rows_E.device, len(asked)
    entries = np.array([slab.rows_E.numel() for slab in asked], dtype=np.int64)
    rows = np.array([slab.rows for slab in asked], dtype=np.int64)
    bounds = np.minimum(entries, rows)
    direct = np.array([slab.direct for slab in asked], dtype=np.int64)
    many = np.where(entries > direct, 2 * entries // direct, 0)  # a run of n > direct has at most n / direct + 1 pieces
    segments = [0 if slab.offsets is None else slab.offsets.numel() - 1 for slab in asked]
    addresses = [0 if slab.offsets is None else slab.offsets.data_ptr() for slab in asked]
    table = [
        *map(_starts, (entries, rows, bounds + 1, many, entries + 1)),
        [slab.rows_E.data_ptr() for slab in asked],
        addresses,
        segments,
        direct.tolist(),
    ]
    facts = to_device(np.array([[*line, 0][: slabs + 1] for line in table], dtype=np.int64), device)
    total, slots, pieces = int(entries.sum()), int(bounds.sum()) + slabs, int(many.sum())
    narrow = torch.int32 if total <= INT32 else torch.int64
    steps = halvings(slabs)
    numbers = torch.empty(total, dtype=torch.int32 if int(rows.sum()) <= INT32 else torch.int64, device=device)
    sorted_E, order_E = numbers, torch.empty(0, dtype=torch.int64, device=device)
    runs_E = order_E
    if total:
        launch(_number, -(-total // BLOCK), numbers, facts, slabs, total, steps, BLOCK=BLOCK)
        sorted_E, order_E = torch.sort(numbers, stable=True)
        runs_E = (sorted_E[1:] != sorted_E[:-1]).cumsum(0)  # of entry i > 0, runs that began behind the first entry
    rows_E, segments_E = torch.empty_like(sorted_E), torch.empty(total, dtype=narrow, device=device)
    starts, counts = torch.empty(slots, dtype=narrow, device=device), torch.empty(slabs, dtype=torch.int64, device=device)
    of_slot = torch.empty(slots if pieces else 0, dtype=torch.int64, device=device)
    most = halvings(max(segments, default=0))
    launch(
        _cut,
        -(-(total + slabs) // BLOCK),
        rows_E,
        segments_E,
        starts,
        counts,
        of_slot,
        sorted_E,
        order_E,
        runs_E,
        facts,
        slabs,
        total + slabs,
        steps,
        most,
        halvings(total),
        PIECES=pieces > 0,
        BLOCK=BLOCK,
    )
    cut = _pieces(starts, of_slot, facts, bounds, many) if pieces else [None] * slabs
    parts = zip(
        rows_E.split(entries.tolist()),
        segments_E.split(entries.tolist()),
        starts.split((bounds + 1).tolist()),
        counts.split(1),
        cut,
        strict=True,
    )
    return [Order(*part) for part in parts]


def _contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _starts(sizes: np.ndarray) -> list[int]:
    return [0, *np.cumsum(sizes).tolist()]


def _pieces(
    starts: torch.Tensor, of_slot: torch.Tensor, facts: torch.Tensor, bounds: np.ndarray, many: np.ndarray
) -> list[Pieces | None]:
    """Pieces of about as many entries as their run has pieces, so that neither is a long way for one program.

    of_slot: into how many pieces each run is cut.
    """
    slabs, device, slots, pieces = len(bounds), starts.device, of_slot.numel(), int(many.sum())
    ends = of_slot.cumsum(0)
    begins, until = torch.empty(2, pieces, dtype=torch.int64, device=device).unbind(0)
    firsts, totals = (torch.empty(count, dtype=torch.int64, device=device) for count in (slots, slabs))
    items, deep = max(slots, pieces), halvings(int(bounds.max()))
    launch(
        _cut_pieces,
        -(-items // BLOCK),
        begins,
        until,
        firsts,
        totals,
        starts,
        ends,
        of_slot,
        facts,
        slabs,
        slots,
        pieces,
        halvings(slabs),
        deep,
        BLOCK=BLOCK,
    )
    parts = zip(
        begins.split(many.tolist()), until.split(many.tolist()), firsts.split((bounds + 1).tolist()), totals.split(1), strict=True
    )
    return [Pieces(*part) if some else None for part, some in zip(parts, many.tolist(), strict=True)]


# facts: by slab, `slabs + 1` numbers each: where its entries begin, its rows, its slots (one a run, and one), its pieces, its items
# (one an entry, and one); the addresses of its rows and offsets (0 where it has none), its segments, and its `direct`.


@triton.jit(do_not_specialize=["slabs", "total", "halvings"])
def _number(numbers, facts, slabs, total, halvings, BLOCK: tl.constexpr):
    """The rows of all slabs, numbered through."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < total
    slab = not_above(facts, 0, slabs, entry, live, halvings) - 1
    within = entry - tl.load(facts + slab, mask=live, other=0)
    address = tl.load(facts + 5 * (slabs + 1) + slab, mask=live, other=0) + within * 8
    row = tl.load(address.to(tl.pointer_type(tl.int64)), mask=live, other=0)
    number = row + tl.load(facts + slabs + 1 + slab, mask=live, other=0)
    tl.store(numbers + entry, number.to(numbers.dtype.element_ty), mask=live)


@triton.jit
def _runs_before(runs_E, entry, live):
    """How many runs end before the one of each entry."""
    return tl.load(runs_E + entry - 1, mask=live & (entry > 0), other=0)


@triton.jit(do_not_specialize=["slabs", "items", "halvings", "segment_halvings", "entry_halvings"])
def _cut(
    rows_E,
    segments_E,
    starts,
    counts,
    of_slot,
    sorted_E,
    order_E,
    runs_E,
    facts,
    slabs,
    items,
    halvings,
    segment_halvings,
    entry_halvings,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What each slab has of the sorted entries. An item is an entry, or what stands behind the last one of a slab; item k of a slab
    writes the start of its run, and into how many pieces that is cut, where it is the first of it; and the start of run k where
    there is no such run.
    """
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = item < items
    slab = not_above(facts, 4 * (slabs + 1), slabs, item, live, halvings) - 1
    first = tl.load(facts + slab, mask=live, other=0)
    end = tl.load(facts + slab + 1, mask=live, other=0)
    entry = item - slab
    within = entry - first
    there = live & (entry < end)
    some = live & (first < end)
    begun = _runs_before(runs_E, first, some)
    distinct = tl.where(some, _runs_before(runs_E, end - 1, some) - begun + 1, 0)
    tl.store(counts + slab, distinct, mask=live & (within == 0))

    number = _runs_before(runs_E, entry, there) - begun
    before = _runs_before(runs_E, entry - 1, there & (within > 0)) - begun
    slots = tl.load(facts + 2 * (slabs + 1) + slab, mask=live, other=0)
    slots_end = tl.load(facts + 2 * (slabs + 1) + slab + 1, mask=live, other=0)
    begins = there & ((within == 0) | (number != before))
    tl.store(starts + slots + number, within.to(starts.dtype.element_ty), mask=begins)
    beyond = live & (within >= distinct) & (slots + within < slots_end)
    tl.store(starts + slots + within, (end - first).to(starts.dtype.element_ty), mask=beyond)

    of_all = tl.load(sorted_E + entry, mask=there, other=0).to(tl.int64)
    if PIECES:
        direct = tl.load(facts + 8 * (slabs + 1) + slab, mask=live, other=1)
        far = begins & (entry + direct < end)
        long = far & (tl.load(sorted_E + entry + direct, mask=far, other=0).to(tl.int64) == of_all)
        # Few runs are long: where none begins in this block, nothing is searched.
        rounds = tl.where(tl.max(long.to(tl.int32), 0) > 0, entry_halvings, 0)
        length = tl.where(long, not_above(sorted_E, entry, end - entry, of_all, long, rounds), 0)
        size = _piece_size(length, direct)
        tl.store(of_slot + slots + number, (length + size - 1) // size, mask=begins)
        tl.store(of_slot + slots + within, tl.zeros_like(within), mask=beyond)

    row = of_all - tl.load(facts + slabs + 1 + slab, mask=live, other=0)
    tl.store(rows_E + entry, row.to(rows_E.dtype.element_ty), mask=there)
    place = tl.load(order_E + entry, mask=there, other=0) - first
    address = tl.load(facts + 6 * (slabs + 1) + slab, mask=live, other=0)
    count = tl.load(facts + 7 * (slabs + 1) + slab, mask=live, other=0)
    listed = there & (address != 0)
    offsets = tl.where(listed, address, 0).to(tl.pointer_type(tl.int64))
    # Empty segments have the start of the one behind them.
    segment = tl.where(listed, not_above(offsets, 0, tl.where(listed, count, 0), place, listed, segment_halvings) - 1, place)
    tl.store(segments_E + entry, segment.to(segments_E.dtype.element_ty), mask=there)


@triton.jit
def _piece_size(length, direct):
    """The least direct * 2^d of which a run of this length has no more than direct * 2^d."""
    doublings = tl.zeros_like(length)
    limit = direct * direct
    for doubling in tl.static_range(MOST_DOUBLINGS):
        doublings += (length > (limit << (2 * doubling))).to(tl.int64)
    return direct << doublings


@triton.jit
def _length(starts, slot, live):
    first = tl.load(starts + slot, mask=live, other=0).to(tl.int64)
    return tl.load(starts + slot + 1, mask=live, other=0).to(tl.int64) - first


@triton.jit(do_not_specialize=["slabs", "slots", "pieces", "halvings", "slot_halvings"])
def _cut_pieces(
    begins,
    until,
    firsts,
    totals,
    starts,
    ends,
    of_slot,
    facts,
    slabs,
    slots,
    pieces,
    halvings,
    slot_halvings,
    BLOCK: tl.constexpr,
):
    """Where each run's pieces begin, and which entries each piece has. ends: pieces of all slots up to each."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = item < slots
    slab = not_above(facts, 2 * (slabs + 1), slabs, item, live, halvings) - 1
    first = tl.load(facts + 2 * (slabs + 1) + slab, mask=live, other=0)
    last = tl.load(facts + 2 * (slabs + 1) + slab + 1, mask=live, other=1) - 1
    before = tl.load(ends + first - 1, mask=live & (first > 0), other=0)
    mine = tl.load(ends + item, mask=live, other=0) - tl.load(of_slot + item, mask=live, other=0) - before
    tl.store(firsts + item, mine, mask=live)
    total = tl.load(ends + last, mask=live, other=0) - before
    tl.store(totals + slab, total, mask=live & (item == first))

    live = item < pieces
    slab = not_above(facts, 3 * (slabs + 1), slabs, item, live, halvings) - 1
    first = tl.load(facts + 2 * (slabs + 1) + slab, mask=live, other=0)
    last = tl.load(facts + 2 * (slabs + 1) + slab + 1, mask=live, other=1) - 1
    before = tl.load(ends + first - 1, mask=live & (first > 0), other=0)
    number = item - tl.load(facts + 3 * (slabs + 1) + slab, mask=live, other=0)
    run = first + not_above(ends, first, last - first, number + before, live, slot_halvings)
    run = tl.minimum(run, tl.maximum(last - 1, first))  # pieces behind the last one have anything
    direct = tl.load(facts + 8 * (slabs + 1) + slab, mask=live, other=1)
    size = _piece_size(_length(starts, run, live), direct)
    whole_first = tl.load(starts + run, mask=live, other=0).to(tl.int64)
    whole_end = tl.load(starts + run + 1, mask=live, other=0).to(tl.int64)
    mine = tl.load(ends + run, mask=live, other=0) - tl.load(of_slot + run, mask=live, other=0) - before
    begin = whole_first + (number - mine) * size
    tl.store(begins + item, begin, mask=live)
    tl.store(until + item, tl.minimum(begin + size, whole_end), mask=live)
