"""Which interactions are held out of training, by one rule for every kind of model, and what is held out of whom.

| kind | held out of each user |
|---|---|
| leave_one_out | one of two or more, by a hash of its row |
| last | the last of two or more |
| ratio | a fraction of them, by a hash of their rows |
| time | what is newer than a moment, the same for all users |

Where training is to be evaluated on other interactions than the end result is (`validation`), as many are held out once more: of
three or more the one before (leave_one_out, last), another fraction (ratio), the ones before those (time).

Legend: n interactions, u users who have any held out, h interactions held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shardembed.errors import DataError
from shardembed.recipes.split_config import RankingSplitConfig

TRAINING, VALIDATION, TEST = range(3)
NONE_LEFT = "data.split holds all interactions out, and leaves none to train on"


@dataclass(frozen=True)
class Held:
    """What is held out of users, for one purpose.

    Attributes:
        users: int64 `[u]`, ascending.
        starts: where in `items` each of them begins, int64 `[u + 1]`.
        items: int64 `[h]`, user after user, each one's in the order of the source or of time.
    """

    users: np.ndarray
    starts: np.ndarray
    items: np.ndarray

    @staticmethod
    def of(users: np.ndarray, items: np.ndarray) -> Held:
        """Of interactions in any order; those of a user stay in theirs."""
        order = np.argsort(users, kind="stable")
        distinct, counts = np.unique(users, return_counts=True)
        return Held(distinct, np.append(0, np.cumsum(counts)), items[order])

    @property
    def owners(self) -> np.ndarray:
        """The user of each of `items`, int64 `[h]`."""
        return np.repeat(self.users, np.diff(self.starts))

    def only(self, kept: np.ndarray) -> Held:
        """The part of the users that `kept`, bool `[u]`, says."""
        mine = np.repeat(kept, np.diff(self.starts))
        return Held(self.users[kept], np.append(0, np.cumsum(np.diff(self.starts)[kept])), self.items[mine])


def labels(users: np.ndarray, keys: Sequence[np.ndarray], split: RankingSplitConfig, name: str) -> np.ndarray:
    """What each interaction is for: int8 `[n]`, `TRAINING`, `VALIDATION` or `TEST`.

    Args:
        users: int64 `[n]`, numbers from 0.
        keys: by which a user's interactions are ordered, the most important one first; of `time` the times, and the nanoseconds
            beyond where there are any. Of equals, the later row is the later one.
        name: of the source, for messages.

    Raises:
        DataError: nothing would be left for training, or nothing is held out at a moment.
    """
    found = _by_moment(keys, split, name) if split.kind == "time" else _by_user(users, keys, split)
    if not (found == TRAINING).any():
        raise DataError(f"{name}: {NONE_LEFT}")
    return found


def how_many(counts: np.ndarray, split: RankingSplitConfig) -> tuple[np.ndarray, np.ndarray]:
    """Of users with so many interactions each, how many are for the test and how many for validation.

    Fractions are those of RecBole's ratio-based splitting of each user's interactions (`_calcu_split_ids`): rounded down, but one
    where that is none, as long as two are left for training.
    """
    if split.kind != "ratio":
        return (counts > 1).astype(np.int64), ((counts > 2) & split.validation).astype(np.int64)
    # In the order in which RecBole works it out: of [training, validation, test] the last part is topped up first.
    assert split.share is not None
    share = split.share
    each = (share * counts).astype(np.int64)
    test, validation = each.copy(), each * split.validation
    left = counts - test - validation
    wanted = (share * counts > 0) & (share * counts < 1)
    for part, there in ((test, True), (validation, split.validation)):
        more = wanted & (left > 1) & there
        part += more
        left -= more
    return test, validation


def _by_user(users: np.ndarray, keys: Sequence[np.ndarray], split: RankingSplitConfig) -> np.ndarray:
    order = np.lexsort((*reversed(keys), users))  # stable
    counts = np.bincount(users)
    ends = np.cumsum(counts)
    behind = np.repeat(ends, counts) - 1 - np.arange(len(users))  # of each user's, how many come after it
    test, validation = (np.repeat(each, counts) for each in how_many(counts, split))
    sorted_labels = np.full(len(users), TRAINING, np.int8)
    sorted_labels[behind < test + validation] = VALIDATION
    sorted_labels[behind < test] = TEST
    found = np.empty_like(sorted_labels)
    found[order] = sorted_labels
    return found


def _by_moment(keys: Sequence[np.ndarray], split: RankingSplitConfig, name: str) -> np.ndarray:
    """Those newer than a moment, or from a moment on where one is given. What happens at one moment stays together."""
    order = np.lexsort(tuple(reversed(keys)))
    found = np.full(len(order), TRAINING, np.int8)
    if split.start is not None:
        found[keys[0] >= split.moment] = TEST
        if not (found == TEST).any():
            raise DataError(f"{name}: data.split: no interaction is at {split.start} or later; is the unit of time the same?")
        return found
    assert split.share is not None
    # Places in the order of time that begin a new moment: only there it may be cut.
    changes = np.zeros(len(order), bool)
    for key in keys:
        changes[1:] |= key[order][1:] != key[order][:-1]
    each, place = int(split.share * len(order)), len(order)
    for label in (TEST, VALIDATION)[: 1 + split.validation]:
        if place < each:
            raise DataError(f"{name}: {NONE_LEFT}")
        begins = np.flatnonzero(changes[: place + 1][place - each :]) if each else changes[:0]
        first = place - each + int(begins[0]) if len(begins) else place
        found[order[first:place]] = label
        place = first
    if not (found == TEST).any():
        raise DataError(f"{name}: data.split: the newest {split.share:.0%} are all of one moment, and nothing is newer than that")
    return found
