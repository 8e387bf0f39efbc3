"""Which tables learn: decided where they are made, and by `requires_grad_` afterwards.

A table that was frozen when it was made has neither optimizer state nor messages for gradients, and stays so. One that is frozen
later keeps both: its outputs require no grad, and what reaches its rows is dropped. Whether a backward comes at all depends on it,
so the tables that are frozen travel, as one number, with every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shardembed.errors import UnsupportedError
from shardembed.journey.route import Route, combine
from shardembed.store.slab_spec import SlabSpec
from shardembed.tables.table_config import TableConfig
from shardembed.wire.fingerprint import fingerprint


@dataclass(frozen=True)
class Frozen:
    """The tables of a collection that do not learn now, by number.

    made: those that never will. slabs: whether all of a slab is frozen, a slab each. mixed: some slab has frozen tables beside
    others.
    """

    made: frozenset[int]
    tables: frozenset[int]
    slabs: tuple[bool, ...]
    mixed: bool

    @staticmethod
    def of(tables: Sequence[TableConfig], specs: Sequence[SlabSpec]) -> Frozen:
        made = frozenset(number for number, table in enumerate(tables) if table.frozen)
        return _settled(made, made, specs)

    def changed(self, tables: Sequence[TableConfig], numbers: frozenset[int], still: bool, specs: Sequence[SlabSpec]) -> Frozen:
        """The same with some tables frozen, or thawed.

        Raises:
            UnsupportedError: one of them was made frozen.
        """
        if not still and (never := numbers & self.made):
            raise UnsupportedError(
                f"table {tables[min(never)].name!r} was frozen when it was made, so it has no optimizer state and cannot learn "
                "now; make it unfrozen (weight.requires_grad = True before shard(), freeze=False, frozen=False), and freeze it "
                "afterwards with requires_grad_(False), which can be taken back"
            )
        now = self.tables | numbers if still else self.tables - numbers
        return _settled(self.made, now, specs)

    @property
    def fingerprint(self) -> int:
        """What ranks compare: the tables that were frozen since they were made."""
        return fingerprint(self.tables - self.made)


@dataclass(frozen=True)
class Beside:
    """The Parameters that were to learn beside the tables of a converted model.

    A loop that freezes `model.parameters()` does not meet tables with an optimizer of ours. Whether it was meant for them, nobody
    can know; that they learn on is said once.
    """

    parameters: Sequence[weakref.ref[torch.Tensor]] = ()

    def all_frozen(self) -> bool:
        """Whether none of those that are left learns. As a rule the first one tells."""
        left = False
        for ref in self.parameters:
            parameter = ref()
            if parameter is not None:
                left = True
                if parameter.requires_grad:
                    return False
        return left


def _settled(made: frozenset[int], tables: frozenset[int], specs: Sequence[SlabSpec]) -> Frozen:
    of_slabs = [frozenset(lane.table for lane in spec.lanes) for spec in specs]
    slabs = tuple(those <= tables for those in of_slabs)
    mixed = any(not whole and not those.isdisjoint(tables) for whole, those in zip(slabs, of_slabs, strict=True))
    return Frozen(made, tables, slabs, mixed)


def without_grad(
    outputs: list[torch.Tensor], vectors: Sequence[torch.Tensor], route: Route, frozen: frozenset[int]
) -> list[torch.Tensor]:
    """The outputs, those of frozen tables cut off from the vectors that they share with other tables: only per-sample weights get
    gradients through them.
    """
    wanted = [number for number, feature in enumerate(route.features) if feature.table in frozen]
    weighted = [weights is not None and weights.requires_grad for weights in (route.ids.parts[i].weights for i in wanted)]
    again = combine([part.detach() for part in vectors], route) if any(weighted) else outputs
    for number, learns in zip(wanted, weighted, strict=True):
        outputs[number] = again[number] if learns else outputs[number].detach()
    return outputs
