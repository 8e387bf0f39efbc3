"""How the pooled outputs of a call lie side by side in one tensor, the whole, `[B, sum of embedding_dim]`: worked out once.

What is pooled together, `[B, strips, W]`, is a piece of it. Where there is but one, it is the whole, without a copy: which is why
the bags of a piece stand sample by sample, and in each strip by strip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from shardembed.tables.table_config import Feature, TableConfig

Strip = tuple[int, int]  # the number of a feature, and of a strip of its table's columns


class Run(NamedTuple):
    """Columns that lie side by side in a piece and in the whole.

    Attributes:
        piece: its number.
        start: the first of them in the piece.
        stop: behind the last.
    """

    piece: int
    start: int
    stop: int


@dataclass(frozen=True)
class Columns:
    """Who has which columns of the whole.

    Attributes:
        dtype: of the whole, as of the tables.
        features: those that pool, in their order.
        widths: columns of each.
        sources: the pieces that each comes from.
        runs: of the whole, from left to right.
    """

    dtype: torch.dtype
    features: tuple[int, ...]
    widths: tuple[int, ...]
    sources: tuple[frozenset[int], ...]
    runs: tuple[Run, ...]

    @staticmethod
    def of(
        features: Sequence[Feature], tables: Sequence[TableConfig], slabs: Sequence[tuple[int, Sequence[Sequence[Strip]]]]
    ) -> Columns | None:
        """None where no feature pools, or their tables differ in dtype.

        Args:
            slabs: of each its columns, and the strips of its pieces, in the order in which these are pooled.
        """
        pooled = [i for i, feature in enumerate(features) if feature.pooling is not None]
        if len({tables[features[i].table].dtype for i in pooled}) != 1:
            return None
        pieces = [(width, strips) for width, found in slabs for strips in found]
        runs = {
            strip: Run(number, at * width, (at + 1) * width)
            for number, (width, strips) in enumerate(pieces)
            for at, strip in enumerate(strips)
        }
        sources: dict[int, set[int]] = {i: set() for i in pooled}
        for (feature, _), run in runs.items():
            sources[feature].add(run.piece)
        widths = tuple(tables[features[i].table].embedding_dim for i in pooled)
        in_order = [run for _, run in sorted(runs.items())]
        dtype = tables[features[pooled[0]].table].dtype
        return Columns(dtype, tuple(pooled), widths, tuple(map(frozenset, sources.values())), _joined(in_order))

    @property
    def one_piece(self) -> bool:
        """The whole is what was pooled together."""
        return len(self.runs) == 1

    @cached_property
    def piece_widths(self) -> tuple[int, ...]:
        """Columns of each piece."""
        return tuple(sum(stop - start for start, stop in places) for places in self.of_pieces)

    @cached_property
    def of_pieces(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Where the columns of each piece, from left to right, lie in the whole: where they start, and where they stop."""
        found: dict[int, list[tuple[int, int, int]]] = {}
        at = 0
        for piece, start, stop in self.runs:
            found.setdefault(piece, []).append((start, at, at + stop - start))
            at += stop - start
        return tuple(tuple(place[1:] for place in sorted(found[piece])) for piece in sorted(found))


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same columns in as few runs as can be."""
    found: list[Run] = []
    for run in runs:
        if found and found[-1].piece == run.piece and found[-1].stop == run.start:
            run = run._replace(start=found.pop().start)
        found.append(run)
    return tuple(found)
