"""A batch on its way, and the pass of the autograd engine in which its gradients come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardembed.errors import StepError
from shardembed.journey.route import Route
from shardembed.store.own_parameters import ShardParameter
from shardembed.store.request import Request

if TYPE_CHECKING:  # since Triton may be absent
    from shardembed.kernels.triton.order import Order


@dataclass
class Ticket:
    """A batch whose ids have been sent: what steps 4 to 6 need. Good for one use.

    as_they_are: leave rows longer than max_norm alone. orders: of the rows asked for, a slab each, where a backward may follow.
    still: tables that were frozen in the lookup. shards: those that autograd brings gradients of.
    """

    route: Route
    request: Request
    as_they_are: bool
    used: bool = False
    orders: Sequence[Order | None] = ()
    still: frozenset[int] = frozenset()
    shards: Sequence[ShardParameter] = ()

    def use(self) -> None:
        """Raises StepError where somebody has."""
        if self.used:
            names = sorted({feature.name for feature in self.route.features})
            raise StepError(
                f"the ticket for {', '.join(names[:5])} has been used; a ticket is good for one call, so prefetch again"
            )
        self.used = True


@dataclass(frozen=True)
class Pass:
    """A pass of the autograd engine: its number, the tables whose gradients have come, and those that came again. `fresh` while
    only one lookup has.
    """

    number: int = -1
    tables: frozenset[int] = frozenset()
    twice: frozenset[int] = frozenset()
    fresh: bool = True

    def joined(self, number: int, tables: set[int]) -> Pass:
        """This pass, or the next one, with one more lookup."""
        if number != self.number or number < 0:
            return Pass(number, frozenset(tables))
        return Pass(number, self.tables | tables, self.tables & tables, fresh=False)
