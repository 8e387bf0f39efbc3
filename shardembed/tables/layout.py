"""How a table is cut: a list of shards, which is data and nothing else.

Rows and columns are Python `range`s: `range(0, 100)` is a block of rows, `range(1, 100, 4)` every fourth row from row 1 on. A
layout is a set of column strips that tile the columns; each strip is cut by rows on its own, into blocks (uneven bounds
allowed) or into the residues of one stride. A shard with several ranks is a copy on each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardembed.errors import PlanError

MAX_RANKS = 1 << 20  # beyond that a number is a slip or a trap: there are figures of each rank in memory


@dataclass(frozen=True)
class Shard:
    """A cut-out of a table.

    Attributes:
        rows: of the table, ascending: a block, or every n-th row.
        columns: of the table, one strip.
        ranks: those that hold it; several hold copies.
    """

    rows: range
    columns: range
    ranks: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        rows, columns = self.rows, self.columns
        return {"rows": [rows.start, rows.stop, rows.step], "columns": [columns.start, columns.stop], "ranks": list(self.ranks)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Shard:
        """Raises TypeError or ValueError where a number is none: a stranger's 3.0 or true would equal one."""
        rows, columns, ranks = data["rows"], data["columns"], data["ranks"]
        if len(rows) != 3 or len(columns) != 2 or not isinstance(ranks, list):
            raise ValueError("a shard has three numbers of rows, two of columns, and a list of ranks")
        return Shard(range(*map(whole, rows)), range(*map(whole, columns)), tuple(map(whole, ranks)))


def whole(value: Any) -> int:
    """`value`, if it is a whole number of at most 63 bits, as the JSON of a plan has them.

    Raises:
        TypeError: it is none.
    """
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError(f"{value!r:.40} is not a whole number from 0 to 2^63 - 1")
    return value


def meeting(rows: range, first: int, stop: int) -> tuple[slice, slice] | None:
    """Where `rows` and the rows from `first` up to `stop` meet: which of the latter, and which of the former; None if nowhere."""
    # Two progressions of which one has step 1: where the other enters and leaves it, rounded up.
    begin = max(0, -(-(first - rows.start) // rows.step))  # how many of `rows` lie before `first`
    inside = rows[begin : max(begin, -(-(stop - rows.start) // rows.step))]
    if not inside:
        return None
    return slice(inside.start - first, inside[-1] - first + 1, rows.step), slice(begin, begin + len(inside))


@dataclass(frozen=True)
class Strip:
    """The part of a layout that lies in one range of columns.

    Attributes:
        columns: of the table.
        blocks: the shards that hold these columns, in the order of their first row.
    """

    columns: range
    blocks: tuple[Shard, ...]

    @property
    def stride(self) -> int:
        """n where block r holds the rows with `id % n == r`; 1 where blocks are contiguous."""
        return max(block.rows.step for block in self.blocks)


@dataclass(frozen=True)
class Layout:
    """A table, cut into shards.

    Attributes:
        num_embeddings: rows of the table; buckets of a dynamic one, which then stand for rows in all of this (`tables.dynamic`).
        embedding_dim: columns of the table.
        shards: which together hold each element once.

    Raises:
        PlanError: the shards do not tile the table, each element once.
    """

    num_embeddings: int
    embedding_dim: int
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        edge = 0
        for strip in self.strips:
            if strip.columns.start != edge or strip.columns.step != 1:
                raise PlanError(f"columns from {edge} on are held by no shard, or twice: {self._cut()}")
            edge = strip.columns.stop
            self._check_rows(strip)
        if edge != self.embedding_dim:
            raise PlanError(f"the shards hold columns up to {edge}, the table has {self.embedding_dim}: {self._cut()}")
        for shard in self.shards:
            if not shard.ranks or len(set(shard.ranks)) != len(shard.ranks) or min(shard.ranks) < 0:
                raise PlanError(f"a shard needs at least one rank, each once and not negative: {shard!s:.200}")

    def _check_rows(self, strip: Strip) -> None:
        stride = strip.stride  # once: it looks at every block
        if stride > 1:
            residues = min(stride, self.num_embeddings)
            if (
                len(strip.blocks) != residues
            ):  # first: a plan from a file may claim any number of rows, and a list of ranges takes memory
                raise PlanError(f"a strided strip needs one shard for each of its {residues} residues: {self._cut()}")
            whole = [range(r, self.num_embeddings, stride) for r in range(residues)]
            if [block.rows for block in strip.blocks] != whole:
                raise PlanError(f"a strided strip needs one shard for each of its {residues} residues: {self._cut()}")
            return
        edge = 0
        for block in strip.blocks:
            if block.rows.start != edge or len(block.rows) == 0:
                raise PlanError(f"rows from {edge} on are held by no shard, or twice, or a shard is empty: {self._cut()}")
            edge = block.rows.stop
        if edge != self.num_embeddings:
            raise PlanError(f"the shards hold rows up to {edge}, the table has {self.num_embeddings}: {self._cut()}")

    def _cut(self) -> str:
        return ", ".join(f"rows {s.rows} columns {s.columns} on {s.ranks!s:.80}" for s in self.shards[:8])

    @cached_property
    def strips(self) -> tuple[Strip, ...]:
        by_columns: dict[range, list[Shard]] = {}
        for shard in self.shards:
            by_columns.setdefault(shard.columns, []).append(shard)
        strips = (Strip(columns, tuple(sorted(cut, key=lambda s: s.rows.start))) for columns, cut in by_columns.items())
        return tuple(sorted(strips, key=lambda strip: strip.columns.start))

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset(rank for shard in self.shards for rank in shard.ranks)

    @property
    def copied(self) -> bool:
        """Some shard is held by more than one rank."""
        return any(len(shard.ranks) > 1 for shard in self.shards)
