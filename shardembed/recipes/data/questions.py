"""What an evaluation asks: which items users took that training has not seen, and what they had met by then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from shardembed.recipes.data.held import Held
from shardembed.recipes.metrics import History


class WithCounts(Protocol):
    """Data whose interactions are counted; arrays as in `Interactions`."""

    @property
    def items(self) -> int: ...

    @property
    def user_counts(self) -> np.ndarray: ...

    @property
    def item_counts(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Questions:
    """Of users who have something in training; others cannot be asked.

    Attributes:
        items: how many there are, all of which are ranked.
        held: what is looked for.
        met_counts: interactions that each user had by then, int64 `[users]`, repeats counted.
        item_counts: of training by item, int64: what is popular.
        histories: what users had met by then, by their place among those that are asked for.
        strangers: users who have something held out and nothing in training.
    """

    items: int
    held: Held
    met_counts: np.ndarray
    item_counts: np.ndarray
    histories: Callable[[np.ndarray], History]
    strangers: int

    @staticmethod
    def of(data: WithCounts, held: Held, histories: Callable[[np.ndarray], History], before: Held | None) -> Questions:
        """before: what users met between training and the questions."""
        met = data.user_counts if before is None else data.user_counts + np.bincount(before.owners, minlength=len(data.user_counts))
        known = data.user_counts[held.users] > 0
        return Questions(data.items, held.only(known), met, data.item_counts, histories, int((~known).sum()))
