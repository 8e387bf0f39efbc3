"""The kinds of sharding, as small frozen values that turn into a layout once the table and the ranks are known.

A kind is nothing but a function that builds a list of shards; nothing after this file knows kinds exist.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from shardembed.config.scalars import integer
from shardembed.errors import PlanError
from shardembed.tables.layout import MAX_RANKS, Layout, Shard

Packing = Literal["unique", "bag"]
PACKINGS: tuple[Packing, ...] = ("unique", "bag")


@dataclass(frozen=True)
class Cluster:
    """The ranks of a job.

    Attributes:
        world_size: how many there are.
        ranks_per_node: how many of them share a node; the last node may have fewer.
    """

    world_size: int
    ranks_per_node: int

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= MAX_RANKS or self.ranks_per_node < 1:
            raise PlanError(
                f"a plan is for 1 to {MAX_RANKS:,} ranks with at least one to a node, not for {self.world_size:,} with "
                f"{self.ranks_per_node:,}"
            )

    def node(self, index: int) -> tuple[int, ...]:
        nodes = -(-self.world_size // self.ranks_per_node)
        if not 0 <= index < nodes:
            raise PlanError(
                f"there is no node {index}: {self.world_size} ranks at {self.ranks_per_node} a node are {nodes} node(s)"
            )
        first = index * self.ranks_per_node
        return tuple(range(first, min(first + self.ranks_per_node, self.world_size)))


@dataclass(frozen=True)
class Placement:
    """How a table is to be cut, before its size and the ranks are known. Made by `row_wise()` and its siblings. Fields that a kind
    does not use stay at None.

    Attributes:
        kind: of `KINDS`.
        ranks: where the parts lie, in their order; None takes all ranks, or all of a node.
        bounds: the inner row bounds of a strip, of a dynamic table in buckets (`TableConfig.cut_rows`); None cuts evenly.
        strided: True deals rows out, row i to block i % n; False cuts contiguous blocks; None deals out unless there are bounds.
        strips: of columns, of a grid.
        node: which the table lies in, of table_row_wise.
        packing: how ids travel: "unique" (each distinct id once) or "bag" (one partial sum a bag and owner). None takes "bag" for
            tables that pool and whose rows have one owner, which then answers with whole sums, and "unique" for others: the forward
            has `nn.EmbeddingBag`'s bits with both (tables of 16 bits take "unique" for that).
    """

    kind: str
    ranks: tuple[int, ...] | None = None
    bounds: tuple[int, ...] | None = None
    strided: bool | None = None
    strips: int | None = None
    node: int | None = None
    packing: Packing | None = None

    def __post_init__(self) -> None:
        if self.packing not in (None, *PACKINGS):
            raise PlanError(f"packing must be 'unique' or 'bag', not {self.packing!r}")
        for name in ("ranks", "bounds", "strips", "node"):
            object.__setattr__(self, name, _integers(name, getattr(self, name)))
        if self.ranks is not None and not self.ranks:
            raise PlanError("ranks must name at least one rank; leave it out for the default")
        if self.bounds is not None and self.strided:
            raise PlanError("bounds cut contiguous blocks; they cannot be combined with strided=True")

    def layout(self, num_embeddings: int, embedding_dim: int, cluster: Cluster) -> Layout:
        """The shards of a table of this size on this cluster. num_embeddings: rows, or buckets of a dynamic table, which are
        cut in their place.

        Raises:
            PlanError: the kind does not fit the table or the ranks.
        """
        shards = _BUILDERS[self.kind](self, num_embeddings, embedding_dim, cluster)
        return Layout(num_embeddings, embedding_dim, tuple(shards))


def table_wise(rank: int, *, packing: Packing | None = None) -> Placement:
    """The whole table on one rank."""
    return Placement("table_wise", ranks=(rank,), packing=packing)


def row_wise(
    ranks: Sequence[int] | None = None,
    *,
    bounds: Sequence[int] | None = None,
    strided: bool | None = None,
    packing: Packing | None = None,
) -> Placement:
    """Rows dealt out over `ranks` (default: all), row i to the (i % n)-th of them; or cut into contiguous blocks, even ones with
    `strided=False`, others at `bounds` (one fewer than ranks).

    Ids are often sorted by popularity, as those of `Vocabulary` are: then the rank with the first of several blocks would be asked
    for most rows, and all others would wait for it.
    """
    return Placement("row_wise", _several(ranks), _several(bounds), strided, packing=packing)


def column_wise(ranks: Sequence[int] | None = None, *, packing: Packing | None = None) -> Placement:
    """Columns cut evenly over `ranks` (default: all; a rank may be named again to hold two strips)."""
    return Placement("column_wise", _several(ranks), packing=packing)


def table_row_wise(node: int, *, strided: bool | None = None, packing: Packing | None = None) -> Placement:
    """Rows dealt out over the ranks of one node, so that the table's traffic ends inside it. strided: as of `row_wise`."""
    return Placement("table_row_wise", strided=strided, node=node, packing=packing)


def grid(
    strips: int, ranks: Sequence[int] | None = None, *, strided: bool | None = None, packing: Packing | None = None
) -> Placement:
    """`strips` strips of columns, each dealt out by rows over its part of `ranks`. strided: as of `row_wise`.

    By default every strip takes a node's ranks, strip i those of node i modulo the number of nodes. With `ranks` given, they
    are dealt out to the strips in equal parts.
    """
    return Placement("grid", _several(ranks), None, strided, strips, packing=packing)


def replicated() -> Placement:
    """A copy on every rank: looked up locally, gradients summed by one all-reduce a step."""
    return Placement("replicated")


def _several(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(numbers)


def _integers(name: str, value: Any) -> Any:
    """A field's integer or integers, as Python's."""
    if value is None:
        return None
    given = value if isinstance(value, tuple) else (value,)
    found = tuple(integer(number) for number in given)
    if None in found:
        raise PlanError(f"{name} must be {'integers' if isinstance(value, tuple) else 'an integer'}, not {value!r}")
    return found if isinstance(value, tuple) else found[0]


def _even(size: int, parts: int) -> list[range]:
    """`parts` contiguous ranges whose sizes differ by one at most; empty ones last."""
    edges = [part * (size // parts) + min(part, size % parts) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def _row_cuts(placement: Placement, rows: int, parts: int) -> list[range]:
    if placement.strided or (placement.strided is None and placement.bounds is None):
        return [range(residue, rows, parts) for residue in range(parts)]
    if placement.bounds is None:
        return _even(rows, parts)
    edges = (0, *placement.bounds, rows)
    if len(edges) != parts + 1 or list(edges) != sorted(edges):
        raise PlanError(f"row bounds {placement.bounds} must be {parts - 1} ascending numbers up to {rows}, for {parts} ranks")
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def _cut_rows(placement: Placement, rows: int, columns: range, ranks: Sequence[int]) -> list[Shard]:
    cuts = zip(_row_cuts(placement, rows, len(ranks)), ranks, strict=True)
    return [Shard(cut, columns, (rank,)) for cut, rank in cuts if len(cut)]


def _table_wise(placement: Placement, rows: int, columns: int, cluster: Cluster) -> list[Shard]:
    return [Shard(range(rows), range(columns), placement.ranks or (0,))]


def _row_wise(placement: Placement, rows: int, columns: int, cluster: Cluster) -> list[Shard]:
    ranks = placement.ranks or tuple(range(cluster.world_size))
    return _cut_rows(placement, rows, range(columns), ranks)


def _column_wise(placement: Placement, rows: int, columns: int, cluster: Cluster) -> list[Shard]:
    ranks = placement.ranks or tuple(range(min(cluster.world_size, columns)))
    if len(ranks) > columns:
        raise PlanError(f"{columns} columns cannot be cut over {len(ranks)} ranks; name at most {columns}")
    return [Shard(range(rows), cut, (rank,)) for cut, rank in zip(_even(columns, len(ranks)), ranks, strict=True)]


def _table_row_wise(placement: Placement, rows: int, columns: int, cluster: Cluster) -> list[Shard]:
    return _cut_rows(placement, rows, range(columns), cluster.node(placement.node or 0))


def _grid(placement: Placement, rows: int, columns: int, cluster: Cluster) -> list[Shard]:
    strips = 1 if placement.strips is None else placement.strips
    if not 1 <= strips <= columns:
        raise PlanError(f"{columns} columns cannot be cut into {strips} strips")
    if placement.ranks is not None and len(placement.ranks) % strips:
        raise PlanError(f"{len(placement.ranks)} ranks cannot be dealt out to {strips} strips in equal parts")
    nodes = -(-cluster.world_size // cluster.ranks_per_node)
    shards: list[Shard] = []
    for index, cut in enumerate(_even(columns, strips)):
        part = len(placement.ranks) // strips if placement.ranks else 0
        ranks = placement.ranks[index * part : (index + 1) * part] if placement.ranks else cluster.node(index % nodes)
        shards += _cut_rows(placement, rows, cut, ranks)
    return shards


def _replicated(placement: Placement, rows: int, columns: int, cluster: Cluster) -> list[Shard]:
    return [Shard(range(rows), range(columns), tuple(range(cluster.world_size)))]


# Every kind of sharding, and the shards it makes: to add one, add a line, and a function like `row_wise` for users.
_BUILDERS: dict[str, Callable[[Placement, int, int, Cluster], list[Shard]]] = {
    "table_wise": _table_wise,
    "row_wise": _row_wise,
    "column_wise": _column_wise,
    "table_row_wise": _table_row_wise,
    "grid": _grid,
    "replicated": _replicated,
}
KINDS = tuple(_BUILDERS)
