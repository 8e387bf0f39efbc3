"""Recall@k and NDCG@k with one or more relevant items a user, for ranked lists and for the popularity baseline.

One rule holds for questions and candidates: what a user had met is either ranked and may be asked for, or neither (`relevant`). An
item that was trained on and is asked for again, while the others like it are left out, has hardly a rival: recall would look better
than it is. An item that is held out twice of a user is asked for once.

Recall@k of a user is the share of the relevant items that stand among the first k: hits / relevant, also where there are more than
k. NDCG@k is the sum of 1 / log2(position + 2) over the hits, position 0 being the best, divided by that of the best list, which has
min(k, relevant) hits first (Järvelin and Kekäläinen, 2002). Both are means over users, as RecBole's are.

Legend: Q users, M ranked items, H items that these users had met, R relevant items of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class History:
    """Items of some users: what they had met, or what is relevant.

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
        found: sum of recall.
        gain: sum of NDCG.
    """

    users: float = 0.0
    found: float = 0.0
    gain: float = 0.0

    def __add__(self, other: Score) -> Score:
        return Score(self.users + other.users, self.found + other.found, self.gain + other.gain)

    @property
    def recall(self) -> float:
        return self.found / max(self.users, 1.0)

    @property
    def ndcg(self) -> float:
        return self.gain / max(self.users, 1.0)


def score(positions: np.ndarray, owners: np.ndarray, k: int) -> Score:
    """The sums for relevant items of users `owners` `[R]` (0 to Q - 1, each at least once) that stand at `positions`, from 0."""
    counts = np.bincount(owners)
    hits, gains = positions < k, 1.0 / np.log2(np.arange(k) + 2.0)
    found = np.bincount(owners[hits], minlength=len(counts)) / np.maximum(counts, 1)
    gained = np.bincount(owners[hits], gains[positions[hits]], minlength=len(counts))
    best = np.cumsum(gains)[np.clip(counts, 1, k) - 1]
    return Score(float(len(counts)), float(found.sum()), float((gained / best).sum()))


def relevant(held: History, history: History, items: int) -> History:
    """The items of each user in `held`, each once, that are not in the user's `history`."""
    pairs = np.setdiff1d(held.owners * items + held.items, history.owners * items + history.items)
    return History(pairs // items, pairs % items)


def positions_in_lists(ranked: np.ndarray, wanted: History, history: History, items: int) -> np.ndarray:
    """Where each relevant item stands in its user's list once what was met is left out, int64 `[R]`; M where it is not in it.

    Args:
        ranked: item ids, best first, `[Q, M]`; M of at least k + the longest history makes recall@k exact.
        wanted: relevant items, as `relevant` gives them.
        history: what the users had met.
        items: number of items.
    """
    count, length = ranked.shape
    # (user, item) as one number: a list entry is left out when its number occurs among those of the histories.
    listed = ranked + np.arange(count)[:, None] * items
    before = np.cumsum(~np.isin(listed, history.items + history.owners * items), axis=1) - 1
    pairs = wanted.owners * items + wanted.items  # ascending
    found = np.full(len(pairs), length)
    if len(pairs):
        places = np.minimum(np.searchsorted(pairs, listed), len(pairs) - 1)
        there = pairs[places] == listed
        found[places[there]] = before[there]
    return found


def popularity_ranks(item_counts: np.ndarray) -> np.ndarray:
    """The place of each item in the order of popularity, from 0: int64 `[items]`. Of equals the lower id comes first."""
    ranks = np.empty(len(item_counts), np.int64)
    ranks[np.argsort(-item_counts, kind="stable")] = np.arange(len(item_counts))
    return ranks


def positions_by_popularity(ranks: np.ndarray, wanted: History, history: History) -> np.ndarray:
    """Where each relevant item `[R]` stands in the list of all items by popularity, what its user had met left out; it must be none
    of that.
    """
    # Of a user, those that were met stand side by side, by their ranks. Repeats leave an item out only once.
    met = np.unique(history.owners * len(ranks) + ranks[history.items])
    first = np.searchsorted(met, wanted.owners * len(ranks))
    return ranks[wanted.items] - (np.searchsorted(met, wanted.owners * len(ranks) + ranks[wanted.items]) - first)
