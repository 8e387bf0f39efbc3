"""Ways to cut one table, as data: what each is called, and the shards it makes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from zlib import crc32

from shardembed.planner.workload import Counts, TableLoad, Uniform
from shardembed.tables.layout import Shard
from shardembed.tables.placement import Packing


@dataclass(frozen=True)
class Cut:
    """An option's key.

    Attributes:
        kind: of sharding, as plans name it; "" while it is open.
        packing: how ids travel.
        strips: of columns, C.
        blocks: of rows in each strip, n.
        flavour: how rows are cut: "dealt" to ranks in equal shares, "even" contiguous blocks, or blocks of equal "traffic".
    """

    kind: str
    packing: Packing = "unique"
    strips: int = 1
    blocks: int = 1
    flavour: str = "dealt"

    def __str__(self) -> str:
        if self.kind == "replicated":
            return self.kind
        cuts = [f"{self.strips} strips"] * (self.strips > 1) + [f"{self.blocks} blocks"] * (self.blocks > 1)
        return " ".join([self.kind, self.packing, *cuts, *[f"({self.flavour})"] * (self.flavour != "dealt")])


def ordered(load: TableLoad) -> bool:
    """Whether rows near each other may be asked for alike often."""
    if load.table.dynamic is not None:  # buckets, each of ids from everywhere
        return False
    return not isinstance(load.skew, Uniform) and (load.order != "hashed" or isinstance(load.skew, Counts))


def flavours(load: TableLoad, packing: Packing, blocks: int) -> list[str]:
    # Read by id, a block's distinct ids are what counts: then no flavour is better balanced, or cheaper, than dealt blocks.
    known = load.order == "sorted" or isinstance(load.skew, Counts)
    return ["dealt", "even", "traffic"] if packing == "bag" and blocks > 1 and known and ordered(load) else ["dealt"]


def kinds_of(cut: Cut, node: int) -> list[str]:
    """What a cut can be called."""
    if cut.strips > 1:
        return ["column_wise"] if cut.blocks == 1 else ["grid"]
    if cut.blocks == 1:
        return ["table_wise"]
    return ["row_wise", "table_row_wise"] if cut.blocks == node else ["row_wise"]


def widths_of(columns: int, strips: int) -> list[int]:
    """Columns of each strip, as `placement` cuts them: differing by one at most."""
    return [columns // strips + (strip < columns % strips) for strip in range(strips)]


def dealt(load: TableLoad, ranks: Sequence[int], shares: Sequence[int]) -> list[Shard]:
    """Shares of the rows: every n-th row with a rank as often as its share; contiguous where shares are unequal and rows lie in no
    order, since a layout has a shard for each residue of its stride.
    """
    rows, columns = load.table.cut_rows, range(load.table.embedding_dim)
    if len(ranks) == 1:
        return [Shard(range(rows), columns, (ranks[0],))]
    if ordered(load) or len(set(shares)) == 1:
        step = gcd(*shares)
        owners = _interleaved(ranks, [share // step for share in shares])
        # Popular rows of all tables would meet on the same ranks, did all begin with the same one.
        first = crc32(load.table.name.encode()) % len(owners)
        owners = owners[first:] + owners[:first]
        return [Shard(range(residue, rows, len(owners)), columns, (owner,)) for residue, owner in enumerate(owners)]
    total = sum(shares)
    edges = [rows * edge // total for edge in itertools.accumulate(shares, initial=0)]
    cuts = zip(itertools.pairwise(edges), ranks, strict=True)
    return [Shard(range(low, high), columns, (rank,)) for (low, high), rank in cuts if high > low]


def _interleaved(ranks: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Each rank as often as its count, spread evenly: popular rows have the first residues, and each rank is to get some."""
    spots = [((turn + 0.5) / count, rank) for rank, count in zip(ranks, counts, strict=True) for turn in range(count)]
    return [rank for _, rank in sorted(spots)]
