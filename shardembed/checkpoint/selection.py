"""Some rows of a table, in an order of their own: which row each id became, and which of them a part of the table holds."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch

from shardembed.checkpoint.format.regions import common
from shardembed.errors import CheckpointError, IdRangeError


class IdMap:
    """Where the rows that were loaded lie: row i of the module is row `ids[i]` of the table.

    Called with ids of the table, it gives rows of the module.

    Attributes:
        ids: int64 `[rows]`.
    """

    def __init__(self, name: str, ids: torch.Tensor) -> None:
        self.name, self.ids = name, ids
        self._ascending, self._order = ids.sort()

    def __repr__(self) -> str:
        return f"IdMap({self.name!r}, {len(self.ids)} rows)"

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids`, int64 of the same shape on the same device.

        Raises:
            IdRangeError: a row was not loaded; the message has its id and position.
        """
        rows, found = self.find(ids.to(self.ids.device, torch.int64))
        if not bool(found.all()):
            first = int((~found).reshape(-1).nonzero()[0])
            raise IdRangeError(
                f"{self.name!r}: id {int(ids.reshape(-1)[first])} at position {first} is not one of the {len(self)} rows that were "
                "loaded: name it in rows=, or replace it before"
            )
        return rows.to(ids.device)

    @property
    def ascending(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids in ascending order, and the row of each."""
        return self._ascending, self._order

    def find(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of each id, and whether it has one; where not, the row means nothing."""
        if not len(self):
            return torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        places = torch.searchsorted(self._ascending, ids).clamp_(max=len(self) - 1)
        return self._order[places], self._ascending[places] == ids


def checked_ids(name: str, ids: Any, rows: int | torch.Tensor) -> torch.Tensor:
    """`ids` as int64 on the CPU, if each is a row of a table of `rows`, and none is there twice.

    Args:
        rows: how many there are, or the ids that have one, ascending.

    Raises:
        CheckpointError: otherwise.
    """
    found = torch.as_tensor(ids)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool) or not found.numel()
    if found.dim() != 1 or not whole:
        raise CheckpointError(f"rows[{name!r}] must be a list of ids, not {found.dtype} of shape {tuple(found.shape)}")
    found = found.to("cpu", torch.int64).clone()
    ascending = found.sort().values
    if isinstance(rows, torch.Tensor):
        absent = ascending[~torch.isin(ascending, rows)]
        if len(absent):
            raise CheckpointError(f"rows[{name!r}] has id {int(absent[0])}, which has no row: {len(rows):,} other ids have one")
    elif len(found) and (ascending[0] < 0 or ascending[-1] >= rows):
        wrong = int(ascending[0] if ascending[0] < 0 else ascending[-1])
        raise CheckpointError(f"rows[{name!r}] has id {wrong}, and the table's ids are 0 to {rows - 1}")
    twice = (ascending[1:] == ascending[:-1]).nonzero()
    if len(twice):
        raise CheckpointError(f"rows[{name!r}] has id {int(ascending[twice[0]])} twice; make the ids unique")
    return found


class Selection:
    """All rows of a table of `total`, or those of `ids`: what a part of the table contributes, and where it goes."""

    def __init__(self, total: int, ids: IdMap | None) -> None:
        self._total, self._ids = total, ids
        self._by_residue: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of_chunk(self, rows: range) -> tuple[range | torch.Tensor, slice | torch.Tensor]:
        """Positions in `rows` that are wanted, and the row that each goes to."""
        if self._ids is None:
            return range(len(rows)), slice(rows.start, rows.stop, rows.step)
        ascending, order = self._sorted
        if rows.step > 1:  # ids of one residue are neighbours, so that each chunk costs what it contributes
            residues, places = self._residues(rows.step)
            bounds = torch.searchsorted(residues, torch.tensor([rows.start % rows.step, rows.start % rows.step + 1]))
            chosen = places[bounds[0] : bounds[1]]
            ascending, order = ascending[chosen], order[chosen]
        first, stop = torch.searchsorted(ascending, torch.tensor([rows.start, rows[-1] + 1])).tolist()
        return (ascending[first:stop] - rows.start) // rows.step, order[first:stop]

    def of_ids(self, ids: torch.Tensor, columns: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions in `ids` that are wanted, and the row that each goes to."""
        if self._ids is None:
            return torch.arange(len(ids)), ids
        rows, found = self._ids.find(ids)
        return found.nonzero().squeeze(1), rows[found]

    @cached_property
    def _sorted(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._ids is not None
        ascending, order = self._ids.ids.sort()
        return ascending, order

    def _residues(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        if step not in self._by_residue:
            residues, places = (self._sorted[0] % step).sort(stable=True)
            self._by_residue[step] = residues, places
        return self._by_residue[step]


class Placed:
    """Ids, ascending, and the place of each: as `filling.Rows`. Notes which ids were met, in each strip of columns.

    Args:
        buckets: that they all fall into; None: any.
    """

    def __init__(self, ids: torch.Tensor, places: torch.Tensor, buckets: tuple[range, ...] | None = None) -> None:
        self.ids, self.places, self._buckets = ids, places, buckets
        self.met: dict[range, torch.Tensor] = {}

    def may_be_in(self, buckets: range | None) -> bool:
        """Whether any can be among ids that fall into these buckets."""
        return buckets is None or self._buckets is None or any(common(buckets, mine) is not None for mine in self._buckets)

    def of_chunk(self, rows: range) -> tuple[range | torch.Tensor, slice | torch.Tensor]:
        raise CheckpointError(f"rows {rows} of a dynamic table have no ids")  # `checks` lets no such entry pass

    def watch(self, strips: Iterable[range]) -> None:
        """Note from now on who is met in which of these columns."""
        self.met = {strip: torch.zeros(len(self.ids), dtype=torch.bool) for strip in strips}

    def lost(self) -> torch.Tensor:
        """The ids that were not met in some columns."""
        return self.ids[torch.stack([~met for met in self.met.values()]).any(0)] if self.met else self.ids

    def of_ids(self, ids: torch.Tensor, columns: range) -> tuple[torch.Tensor, torch.Tensor]:
        if not len(self.ids):
            return ids[:0], ids[:0]
        first = int(torch.searchsorted(ids, self.ids[0]))  # ids that are few and near each other may be asked of many
        ids = ids[first : int(torch.searchsorted(ids, self.ids[-1], right=True))]
        numbers = torch.searchsorted(self.ids, ids)
        positions = (self.ids[numbers] == ids).nonzero().squeeze(1)
        numbers = numbers[positions]
        for strip, met in self.met.items():
            met[numbers] |= strip.start >= columns.start and strip.stop <= columns.stop
        return first + positions, self.places[numbers]
