"""Recall and NDCG against a brute-force count."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from shardembed.recipes import metrics
from shardembed.recipes.metrics import History

ITEMS, USERS = 30, 40


@dataclass(frozen=True)
class Case:
    """counts of items, scores of users for items, items by user: relevant ones (each once, none of the history) and histories."""

    counts: np.ndarray
    scores: np.ndarray
    wanted: list[np.ndarray]
    met: list[np.ndarray]

    @property
    def relevant(self) -> History:
        return flat(self.wanted)

    @property
    def history(self) -> History:
        return flat(self.met)


def flat(lists: list[np.ndarray]) -> History:
    return History(np.repeat(np.arange(len(lists)), [len(one) for one in lists]), np.concatenate(lists))


@pytest.fixture
def case() -> Case:
    """Histories repeat items."""
    rng = np.random.default_rng(0)
    wanted = [np.sort(rng.permutation(ITEMS)[: rng.integers(1, 6)]) for _ in range(USERS)]
    drawn = [rng.integers(ITEMS, size=rng.integers(0, 8)) for _ in range(USERS)]
    met = [history[~np.isin(history, items)] for history, items in zip(drawn, wanted, strict=True)]
    return Case(rng.integers(5, size=ITEMS), rng.random((USERS, ITEMS)), wanted, met)


def brute_force(orders: list[np.ndarray], case: Case) -> list[int]:
    """Of each relevant item the place among those that are allowed."""
    found = []
    for order, wanted, met in zip(orders, case.wanted, case.met, strict=True):
        allowed = [item for item in order.tolist() if item not in met]
        found += [allowed.index(item) for item in wanted]
    return found


def test_positions_in_lists(case: Case) -> None:
    orders = np.argsort(-case.scores, axis=1)
    expected = brute_force(list(orders), case)
    np.testing.assert_array_equal(metrics.positions_in_lists(orders, case.relevant, case.history, ITEMS), expected)
    # Lists cut after k + the longest history: the same wherever it counts.
    k = 5
    cut = metrics.positions_in_lists(orders[:, : k + 7], case.relevant, case.history, ITEMS)
    np.testing.assert_array_equal(np.minimum(cut, k), np.minimum(expected, k))
    part = metrics.positions_in_lists(orders[10:25], case.relevant.of(10, 25), case.history.of(10, 25), ITEMS)
    first, last = np.searchsorted(case.relevant.owners, [10, 25])
    np.testing.assert_array_equal(part, expected[first:last])


def test_positions_by_popularity(case: Case) -> None:
    order = np.array(sorted(range(ITEMS), key=lambda item: (-case.counts[item], item)))
    found = metrics.positions_by_popularity(metrics.popularity_ranks(case.counts), case.relevant, case.history)
    np.testing.assert_array_equal(found, brute_force([order] * USERS, case))


def test_what_was_met_is_not_asked_for_and_nothing_is_asked_for_twice() -> None:
    history = History(np.array([0, 0, 1, 3, 3]), np.array([4, 5, 4, 7, 4]))
    held = History(np.array([0, 0, 1, 2, 2, 2, 3]), np.array([5, 1, 4, 4, 6, 4, 7]))
    left = metrics.relevant(held, history, 8)
    assert list(zip(left.owners.tolist(), left.items.tolist(), strict=True)) == [(0, 1), (2, 4), (2, 6)]
    asked = np.array([True, False, True, False])
    mine = history.only(asked)
    assert (mine.owners.tolist(), mine.items.tolist()) == ([0, 0], [4, 5])
    assert left.only(asked).owners.tolist() == [0, 1, 1]
    nobody = history.only(np.zeros(4, bool))
    assert (len(nobody.owners), len(nobody.items)) == (0, 0)


def test_scores_of_one_relevant_item_each() -> None:
    total = metrics.score(np.array([0, 2, 20]), np.arange(3), 20) + metrics.score(np.array([19, 300]), np.arange(2), 20)
    assert total.recall == 3 / 5
    assert total.ndcg == pytest.approx((1 + 1 / 2 + 1 / np.log2(21)) / 5)
    assert metrics.Score().recall == 0.0


def test_scores_of_several_relevant_items(case: Case) -> None:
    k = 4
    positions = np.array(brute_force(list(np.argsort(-case.scores, axis=1)), case))
    found = metrics.score(positions, case.relevant.owners, k)
    recalls, ndcgs = [], []
    for user, wanted in enumerate(case.wanted):
        mine = positions[case.relevant.owners == user]
        recalls.append((mine < k).sum() / len(wanted))
        ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(wanted))))
        ndcgs.append(sum(1 / np.log2(place + 2) for place in mine if place < k) / ideal)
    assert max(map(len, case.wanted)) > k, "some have more relevant items than a list has places"
    assert (found.users, found.recall, found.ndcg) == (USERS, pytest.approx(np.mean(recalls)), pytest.approx(np.mean(ndcgs)))


def test_users_without_lists_are_no_trouble() -> None:
    nobody = History(np.empty(0, np.int64), np.empty(0, np.int64))
    assert len(metrics.positions_in_lists(np.empty((0, 5), np.int64), nobody, nobody, ITEMS)) == 0
    assert len(metrics.positions_by_popularity(np.arange(ITEMS), nobody, nobody)) == 0
    assert metrics.score(np.empty(0, np.int64), nobody.owners, 5) == metrics.Score()
