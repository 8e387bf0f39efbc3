"""The ids of a dynamic table that lie on this rank, as a save sees them: which have a row, which changed, which are gone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shardembed.kernels.mixing import buckets_of
from shardembed.store.dynamic.census import Census
from shardembed.store.dynamic.keys import DynamicKeys
from shardembed.store.slab import Slab


@dataclass(frozen=True)
class Listed:
    """Ids, ascending, and their places; both int64 `[n]`, on the CPU."""

    ids: torch.Tensor
    places: torch.Tensor

    def only(self, which: torch.Tensor) -> Listed:
        return Listed(self.ids[which], self.places[which])


class Members:
    """Those who are in a census of a slab, which may be of rows or of candidates; counted when they are asked for, and once.

    Attributes:
        slab: the strip of the table.
        census: who is there.
        buckets: of the table.
    """

    def __init__(self, slab: Slab, census: Census, buckets: int) -> None:
        self.slab, self.census, self.buckets = slab, census, buckets
        self._all: tuple[Listed, torch.Tensor] | None = None

    @property
    def keys(self) -> DynamicKeys:
        assert self.slab.dynamic is not None
        return self.slab.dynamic

    @property
    def are_rows(self) -> bool:
        """Else they are candidates."""
        return self.census is self.keys.census

    def of(self, buckets: range) -> Listed:
        """All in these buckets."""
        found, buckets_N = self._counted()
        return found.only(_among(buckets_N, buckets))

    def changed(self, buckets: range) -> Listed:
        """Of these, the ones that were touched since the last full checkpoint."""
        found, touched = self.of(buckets), self.slab.touched
        assert touched is not None
        return found.only(touched.cpu()[found.places])

    def dropped(self, buckets: range) -> torch.Tensor:
        """Ids of these buckets that were there in the last full checkpoint, and are there no more; ascending."""
        noted = self.keys.noted
        assert noted is not None
        noted = noted[_among(buckets_of(noted, self.buckets), buckets)]
        return noted[~torch.isin(noted, self.of(buckets).ids)]

    def _counted(self) -> tuple[Listed, torch.Tensor]:
        if self._all is None:
            places = self.census.living(self.keys.steps)
            ids, order = self.census.ids_S[places].sort()
            found = Listed(ids.cpu(), places[order].cpu())
            self._all = found, buckets_of(found.ids, self.buckets)
        return self._all


@dataclass(frozen=True)
class IdRegion:
    """What lies here of a tensor whose rows go by id.

    Attributes:
        members: whose rows these are.
        blocks: the buckets that lie here, a range a shard.
        columns: of the tensor.
        saves: this rank saves it; another strip's rank does where not.
        tensor: gives `[places, len(columns)]` as it is now; it moves when the table grows.
    """

    members: Members
    blocks: tuple[range, ...]
    columns: range
    saves: bool
    tensor: Callable[[], torch.Tensor]


def ids_now(slab: Slab) -> torch.Tensor:
    """The ids that have a row in a slab, int64, ascending, on the CPU."""
    assert slab.dynamic is not None
    return slab.dynamic.census.ids_S[slab.dynamic.census.living(slab.dynamic.steps)].sort().values.cpu()


def _among(numbers: torch.Tensor, wanted: range) -> torch.Tensor:
    return (numbers >= wanted.start) & (numbers < wanted.stop) & ((numbers - wanted.start) % wanted.step == 0)
