"""Where each row's duplicates are: a stable sort of the entries by row, made before any gradient is there.

Legend: E entries, S segments, U distinct rows (known to the device only), P pieces.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from shardembed.kernels.triton.tiles import launch

DIRECT = 64  # duplicates that one program sums by itself
BLOCK = 1024
MOST_DOUBLINGS = 20


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


def order(rows_E: torch.Tensor, offsets: torch.Tensor | None, rows: int, direct: int = DIRECT) -> Order:
    """Sort the entries of segments by their row in a slab of `rows` rows. Waits for nothing.

    Args:
        direct: the longest run that is not cut. What a sum is depends on it, so it is the same for all calls but in tests.
    """
    entries = rows_E.numel()
    positions = torch.int32 if entries <= torch.iinfo(torch.int32).max else torch.int64
    # 32-bit keys sort in half the time.
    keys = rows_E.to(torch.int32) if rows <= torch.iinfo(torch.int32).max else rows_E
    sorted_E, order_E = torch.sort(keys, stable=True)
    segments_E = order_E
    if offsets is not None:
        segments_E = torch.repeat_interleave(offsets.diff(), output_size=entries)[order_E]
    bound = min(entries, rows)
    starts = torch.full((bound + 1,), entries, dtype=positions, device=rows_E.device)
    count = torch.zeros(1, dtype=torch.int64, device=rows_E.device)
    if entries:
        numbers_E = torch.cat([count, (sorted_E[1:] != sorted_E[:-1]).to(torch.int64)]).cumsum(0)
        count = numbers_E[-1:] + 1
        launch(_mark_starts, -(-entries // BLOCK), starts, numbers_E, entries, BLOCK=BLOCK)
    return Order(sorted_E, segments_E.to(positions), starts, count, _pieces(starts, entries, direct))


def _pieces(starts: torch.Tensor, entries: int, direct: int) -> Pieces | None:
    """Pieces of about as many entries as their run has pieces, so that neither is a long way for one program."""
    if entries <= direct:
        return None
    lengths = starts.diff().to(torch.int64)
    doublings = torch.arange(MOST_DOUBLINGS, device=starts.device)
    sizes = direct << torch.bucketize(lengths, (direct * direct) << (2 * doublings))
    pieces = torch.where(lengths > direct, (lengths + sizes - 1) // sizes, 0)
    ends = pieces.cumsum(0)
    # A run of n > direct entries has at most n / direct + 1 < 2 n / direct of them.
    numbers = torch.arange(2 * entries // direct, device=starts.device)
    run = torch.searchsorted(ends, numbers, right=True).clamp_(max=lengths.numel() - 1)
    begins = starts[run].to(torch.int64) + (numbers - (ends - pieces)[run]) * sizes[run]
    until = torch.minimum(begins + sizes[run], starts[run + 1])
    return Pieces(begins, until, torch.cat([ends.new_zeros(1), ends]), ends[-1:])


@triton.jit(do_not_specialize=["entries"])
def _mark_starts(starts, numbers_E, entries, BLOCK: tl.constexpr):
    """starts[u] = the first entry of run u."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = entry < entries
    number = tl.load(numbers_E + entry, mask=live, other=0)
    before = tl.load(numbers_E + entry - 1, mask=live & (entry > 0), other=-1)
    tl.store(starts + number, entry.to(starts.dtype.element_ty), mask=live & (number != before))
