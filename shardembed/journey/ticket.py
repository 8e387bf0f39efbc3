"""A batch on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shardembed.errors import StepError
from shardembed.journey.messages import Announced
from shardembed.journey.route import Route
from shardembed.store.own_parameters import ShardParameter
from shardembed.store.request import Request

if TYPE_CHECKING:  # since Triton may be absent
    from shardembed.kernels.triton.order import Order


@dataclass
class Ticket:
    """A batch whose ids have been sent: what looks up its rows (stages 4 to 6) and then brings back its gradients. Good for one
    lookup.

    Attributes:
        route: which rows answer which ids.
        asked: what the other ranks asked this one for; or only how much, until the ids of a batch that was sent ahead arrive.
        as_they_are: leave rows longer than max_norm alone.
        used: its rows have been looked up.
        frozen: tables that were frozen in the lookup.
        shards: those that autograd brings gradients of.
        orders: of the rows asked for, a slab each, where a backward may follow.
    """

    route: Route
    asked: Request | Announced
    as_they_are: bool
    used: bool = False
    frozen: frozenset[int] = frozenset()
    shards: Sequence[ShardParameter] = ()
    orders: Sequence[Order | None] = ()

    @property
    def request(self) -> Request:
        """What the other ranks asked this one for."""
        assert isinstance(self.asked, Request)
        return self.asked

    def use(self) -> None:
        """Raises StepError where somebody has."""
        if self.used:
            names = sorted({feature.name for feature in self.route.features})
            raise StepError(
                f"the ticket for {', '.join(names[:5])} has been used; a ticket is good for one call, so prefetch again"
            )
        self.used = True
