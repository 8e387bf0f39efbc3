"""A batch as streams: what the kernels that route it are told of the plan and of the batch, and how they read it.

Legend: E entries (an id in a stream), J streams, B bags, R ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from shardembed.kernels.triton.search import not_above
from shardembed.wire.message import Numbers

# Lines of `Ways.streams`, `Batch.streams` and `Batch.runs`.
SLAB, START, STRIDE, ROWS, FIRST_BLOCK, BLOCKS, PADDING, BAGGED = map(tl.constexpr, range(8))
ID, BAG, PLACE, STEP, LENGTH, RAGGED, SLOT, SLOT_STEP, ITEM, RESET, RESET_SLOT = map(tl.constexpr, range(11))
ENTRY, STREAM, APART, UNIFORM, RUN_SLOT, RUN_PLACES, RUN_BASE = map(tl.constexpr, range(7))


@dataclass(frozen=True)
class Ways:
    """What no batch changes.

    Attributes:
        streams: of each its slab; first position, stride and rows of its lane; number of the lane's first block, and how many it
            has; its padding id or -1; and whether it is read by bag: int64 `[8, J]`.
        blocks: of each its first position; the rank that answers; what makes a position its key; what makes a row its sort key:
            int64 `[4, blocks]`.
        rows: of each (slab, rank) where sort keys of rows begin and end, if there were no bags, int64 `[2, slabs * R]`.
        keys: all sort keys of rows.
        slabs: how many there are.
        ranks: likewise.
        deepest: most blocks of a lane.
    """

    streams: torch.Tensor
    blocks: torch.Tensor
    rows: torch.Tensor
    keys: int
    slabs: int
    ranks: int
    deepest: int


@dataclass(frozen=True)
class Batch:
    """The ids of one batch, as streams, in runs: neighbouring entries of one stream, or of several that stand sample by sample. Of
    what is pooled by id, and of bags of different lengths, the start of each bag gets a slot; in front of those of what is pooled
    together stands one that resets the running sum.

    Attributes:
        ids: of all features.
        lengths: of the bags of the features whose bags differ in length, one feature after the other, int64.
        streams: int64 `[11, J + 1]`, of which the last column is an end. The place of its first id (ID); what is in front of its
            bags in its slab (BAG); where its bags stand among those that are used together, and how far apart (PLACE, STEP); the
            one length of its bags or -1, and where theirs begin in `lengths` (LENGTH, RAGGED); the slots of its bags and how far
            they are apart (SLOT, SLOT_STEP); items, one more than it has bags with slots (ITEM); and of the first stream of what is
            pooled together the slot in front and what stands there, or -1 (RESET_SLOT, RESET).
        runs: int64 `[7, runs + 1]`. Its first entry (ENTRY); its first stream, and how many stand sample by sample (STREAM, APART);
            the one length of its bags or -1 (UNIFORM); the slot of its first bag, its bags, and how many entries those that are
            pooled together have in front of it (RUN_SLOT, RUN_PLACES, RUN_BASE).
        bags: of each slab, read by bag, int64 `[slabs]`.
        slots: how many.
        deepest: most bags with slots of a run.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    streams: Numbers
    runs: Numbers
    bags: Numbers
    slots: int
    deepest: int

    @property
    def counts(self) -> tuple[int, int]:
        """Streams and runs."""
        return self.streams.shape[1] - 1, self.runs.shape[1] - 1

    @property
    def entries(self) -> int:
        return int(self.runs[ENTRY.value, -1])

    def facts(self) -> Numbers:
        """All that the kernels are told: `streams`; of each slab the bags in front of it, and of all together; of each slab its
        bags; then `runs`.
        """
        before = np.append(0, np.cumsum(self.bags))
        return np.concatenate([self.streams.reshape(-1), before, self.bags, self.runs.reshape(-1)])


BATCH_LINES = tl.constexpr(11)


@triton.jit
def of_batch(facts, LINE: tl.constexpr, stream, streams, live):
    return tl.load(facts + LINE * (streams + 1) + stream, mask=live, other=0)


@triton.jit
def of_way(ways, LINE: tl.constexpr, stream, streams, live):
    return tl.load(ways + LINE * streams + stream, mask=live, other=0)


@triton.jit
def bags_before(facts, slab, rank, streams, slabs, ranks, live):
    """Sort keys that stand for bags, in front of those of a slab and rank."""
    lines = facts + BATCH_LINES * (streams + 1)
    before = tl.load(lines + slab, mask=live, other=0)
    return before * ranks + rank * tl.load(lines + slabs + 1 + slab, mask=live, other=0)


@triton.jit
def of_run(facts, LINE: tl.constexpr, run, streams, runs, slabs, live):
    lines = facts + BATCH_LINES * (streams + 1) + 2 * slabs + 1
    return tl.load(lines + LINE * (runs + 1) + run, mask=live, other=0)


@triton.jit
def run_of(facts, entry, streams, runs, slabs, live, halvings):
    """The run that each entry is in."""
    return not_above(facts + BATCH_LINES * (streams + 1) + 2 * slabs + 1, 0, runs, entry, live, halvings) - 1
