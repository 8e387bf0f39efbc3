"""Recall@k and NDCG@k with one held-out item a user, for ranked lists and for the popularity baseline.

One rule holds for questions and candidates: what a user met in training is either ranked and may be asked for, or neither
(`unmet`). An item that was trained on and is asked for again, while the others like it are left out, has hardly a rival: recall
would look better than it is. With one relevant item, recall@k is the share of users whose item stands among the first k. NDCG@k
gives such a user 1 / log2(position + 2) instead of 1, position 0 being the best.

Legend: Q users, M ranked items, H training interactions of these users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class History:
    """What some users met in training.

    Attributes:
        owners: the user (0 to Q - 1) of each entry, int64 `[H]`.
        items: the item of each entry, int64 `[H]`.
    """

    owners: np.ndarray
    items: np.ndarray

    def of(self, first: int, last: int) -> History:
        """The part of the users from `first` up to `last`, renumbered from 0. `owners` must be ascending."""
        low, high = np.searchsorted(self.owners, [first, last])
        return History(self.owners[low:high] - first, self.items[low:high])

    def only(self, kept: np.ndarray) -> History:
        """The part of the users that `kept`, bool `[Q]`, says, renumbered from 0."""
        mine = kept[self.owners]
        return History(np.cumsum(kept)[self.owners[mine]] - 1, self.items[mine])


@dataclass(frozen=True)
class Score:
    """Sums over users, to be added up over batches and ranks before they are divided.

    Attributes:
        users: how many.
        hits: of the held-out item among the best k.
        gain: sum of 1 / log2(1 + rank) of these.
    """

    users: float = 0.0
    hits: float = 0.0
    gain: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(self.users + other.users, self.hits + other.hits, self.gain + other.gain)

    @property
    def recall(self) -> float:
        return self.hits / max(self.users, 1.0)

    @property
    def ndcg(self) -> float:
        return self.gain / max(self.users, 1.0)


def score(positions: np.ndarray, k: int) -> Score:
    """The sums for held-out items that stand at `positions` `[Q]`, from 0."""
    hits = positions < k
    return Score(float(len(positions)), float(hits.sum()), float((1.0 / np.log2(positions[hits] + 2.0)).sum()))


def unmet(held: np.ndarray, history: History, items: int) -> np.ndarray:
    """Whose held-out item `[Q]` is not in the user's own history: bool `[Q]`."""
    return ~np.isin(np.arange(len(held)) * items + held, history.owners * items + history.items)


def positions_in_lists(ranked: np.ndarray, held: np.ndarray, history: History, items: int) -> np.ndarray:
    """Where each user's held-out item stands in its list once training items are left out; M where it is not in it.

    Args:
        ranked: item ids, best first, `[Q, M]`; M of at least k + the longest history makes recall@k exact.
        held: held-out item ids `[Q]`, none of them in the user's own history.
        history: the users' training items.
        items: number of items.
    """
    count, length = ranked.shape
    is_held = ranked == held[:, None]
    # (user, item) as one number: a list entry is left out when its number occurs among those of the histories.
    met = np.isin(ranked + np.arange(count)[:, None] * items, history.items + history.owners * items)
    before = np.cumsum(~met, axis=1) - 1
    return np.where(is_held.any(1), before[np.arange(count), is_held.argmax(1)], length)


def popularity_ranks(item_counts: np.ndarray) -> np.ndarray:
    """The place of each item in the order of popularity, from 0: int64 `[items]`. Of equals the lower id comes first."""
    ranks = np.empty(len(item_counts), np.int64)
    ranks[np.argsort(-item_counts, kind="stable")] = np.arange(len(item_counts))
    return ranks


def positions_by_popularity(ranks: np.ndarray, held: np.ndarray, history: History) -> np.ndarray:
    """Where each user's held-out item `[Q]` stands in the list of all items by popularity, training items left out; it must be none
    of them.
    """
    # Repeats in a history leave an item out only once.
    pairs = np.unique(history.owners * len(ranks) + history.items)
    owners, items = pairs // len(ranks), pairs % len(ranks)
    ahead = ranks[items] < ranks[held[owners]]
    return ranks[held] - np.bincount(owners[ahead], minlength=len(held))
