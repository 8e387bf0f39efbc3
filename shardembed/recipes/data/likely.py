"""Where items stand in the ranking of what made the data up, which no model can better."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shardembed.recipes.metrics import History

BLOCK_ELEMENTS = 1 << 22


def ranked_by(likely: Callable[[slice], np.ndarray], users: int, items: int, wanted: History, history: History) -> np.ndarray:
    """The places of the relevant items `wanted`, int64 `[R]`, when items are ranked by how likely they are.

    Args:
        likely: of some of the users, for each item, float64 `[users, items]`, 0 or more; is written into. users, items: how many
            there are. history: items left out of the ranking.
    """
    found = np.empty(len(wanted.items), np.int64)
    size = max(1, BLOCK_ELEMENTS // items)
    for start in range(0, users, size):
        block = slice(start, min(start + size, users))
        chances, left_out, mine = likely(block), history.of(block.start, block.stop), wanted.of(block.start, block.stop)
        chances[left_out.owners, left_out.items] = -1.0
        ordered = np.sort(chances, axis=1)
        first, last = np.searchsorted(wanted.owners, [block.start, block.stop])
        own = chances[mine.owners, mine.items]
        above = [items - np.searchsorted(ordered[owner], one, side="right") for owner, one in zip(mine.owners, own, strict=True)]
        found[first:last] = np.array(above, np.int64)
    return found
