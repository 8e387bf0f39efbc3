"""Which tables learn: decided where they are made, and by `requires_grad_` afterwards.

A table that was frozen when it was made has neither optimizer state nor messages for gradients, and stays so. One that is frozen
later keeps both: its outputs require no grad, and what reaches its rows is dropped. Whether a backward comes at all depends on it,
so the tables that are frozen travel, as one number, with every call.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from shardembed.errors import UnsupportedError
from shardembed.journey.route import Route, combine
from shardembed.journey.route.side_by_side import Outputs
from shardembed.store.own_parameters import OwnParameters
from shardembed.store.slab_spec import SlabSpec
from shardembed.tables.table_config import TableConfig
from shardembed.wire.fingerprint import fingerprint


@dataclass(frozen=True)
class Frozen:
    """The tables of a collection that do not learn now, by number.

    Attributes:
        names: of all tables of the collection.
        of_slabs: the tables of each slab.
        made: those that were made frozen, and never will learn.
        tables: those that do not learn now.
    """

    names: tuple[str, ...]
    of_slabs: tuple[frozenset[int], ...]
    made: frozenset[int]
    tables: frozenset[int]

    @staticmethod
    def of(tables: Sequence[TableConfig], specs: Sequence[SlabSpec]) -> Frozen:
        made = frozenset(number for number, table in enumerate(tables) if table.frozen)
        of_slabs = tuple(frozenset(lane.table for lane in spec.lanes) for spec in specs)
        return Frozen(tuple(table.name for table in tables), of_slabs, made, made)

    def changed(self, numbers: frozenset[int], frozen: bool) -> Frozen:
        """The same with some tables frozen, or thawed.

        Raises:
            UnsupportedError: as `check_thaw`.
        """
        if not frozen:
            self.check_thaw(numbers)
        return replace(self, tables=self.tables | numbers if frozen else self.tables - numbers)

    def check_thaw(self, numbers: frozenset[int]) -> None:
        """Raises UnsupportedError where one of these tables was made frozen."""
        if never := numbers & self.made:
            raise UnsupportedError(
                f"table {self.names[min(never)]!r} was frozen when it was made, so it has no optimizer state and cannot learn "
                "now; make it unfrozen (weight.requires_grad = True before shard(), freeze=False, frozen=False), and freeze it "
                "afterwards with requires_grad_(False), which can be taken back"
            )

    @property
    def learning(self) -> list[str]:
        """The names of the tables that learn now."""
        return [name for number, name in enumerate(self.names) if number not in self.tables]

    # Asked for in every lookup; worked out when tables are frozen, which is rare.

    @cached_property
    def slabs(self) -> tuple[bool, ...]:
        """Whether all of a slab is frozen, a slab each."""
        return tuple(tables <= self.tables for tables in self.of_slabs)

    @cached_property
    def mixed(self) -> bool:
        """Some slab has frozen tables beside others."""
        return any(not tables <= self.tables and not tables.isdisjoint(self.tables) for tables in self.of_slabs)

    @cached_property
    def fingerprint(self) -> int:
        """What ranks compare: the tables that were frozen since they were made."""
        return fingerprint(self.tables - self.made)


class Freezing:
    """Which tables of a collection learn, from the next lookup or backward on.

    Args:
        frozen: the tables that do not, as they were made.
        stepped: the tables with an optimizer of ours.
        device: of the anchor.

    Attributes:
        frozen: the tables that do not, now.
        anchor: an empty tensor for autograd (see `autograd`): outputs must require grad for it to come back here, though no
            weight of ours is a leaf of its graph. It requires grad as long as a table with an optimizer of ours learns.
    """

    def __init__(self, frozen: Frozen, stepped: frozenset[int], device: torch.device) -> None:
        self._stepped = stepped
        self.anchor = torch.empty(0, device=device)
        self._own_parameters: Sequence[OwnParameters] = ()
        self._dense: Sequence[weakref.ref[torch.Tensor]] = ()
        self._settle(frozen)

    def tell(self, own_parameters: Sequence[OwnParameters]) -> None:
        """Have these say whether their tables are frozen."""
        self._own_parameters = own_parameters

    def change(self, numbers: frozenset[int], frozen: bool) -> None:
        """Freeze tables, or thaw them. Not collective, but for all ranks to do.

        Raises:
            UnsupportedError: one that was made frozen is to learn.
        """
        self._settle(self.frozen.changed(numbers, frozen))
        self._dense = ()  # whoever freezes tables knows that a loop over Parameters does not meet them
        for own in self._own_parameters:
            own.freeze(numbers, frozen)

    def _settle(self, frozen: Frozen) -> None:
        self.frozen = frozen
        self.anchor.requires_grad_(not self._stepped <= frozen.tables)

    def watch(self, dense: Iterable[torch.Tensor]) -> None:
        """Remember the Parameters that learn beside the tables of a converted model.

        A loop that freezes `model.parameters()` does not meet tables with an optimizer of ours. Whether it was meant for them,
        nobody can know; that they learn on is said once.
        """
        self._dense = [weakref.ref(parameter) for parameter in dense]

    def overlooked(self) -> bool:
        """Whether all those Parameters have been frozen since, and tables learn on. True once."""
        if not self._dense or not self._all_frozen():
            return False
        self._dense = ()
        return True

    def _all_frozen(self) -> bool:
        """None of the Parameters that are left learns. As a rule the first one tells."""
        left = False
        for ref in self._dense:
            parameter = ref()
            if parameter is not None:
                left = True
                if parameter.requires_grad:
                    return False
        return left


def without_grad(outputs: Outputs, vectors: Sequence[torch.Tensor], route: Route, frozen: frozenset[int]) -> Outputs:
    """The outputs, each of a frozen table cut off from the vectors that it shares with other tables: only per-sample weights get
    gradients through it. What gets to a frozen table through the whole, its owner drops.
    """
    cut = [number for number, feature in enumerate(route.features) if feature.table in frozen]
    per_sample = [route.ids.parts[number].weights for number in cut]
    learned = [weights is not None and weights.requires_grad for weights in per_sample]
    again = combine([part.detach() for part in vectors], route).each if any(learned) else outputs.each
    each = list(outputs.each)
    for number, learns in zip(cut, learned, strict=True):
        each[number] = again[number] if learns else each[number].detach()
    return outputs._replace(each=each)
