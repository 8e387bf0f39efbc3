"""Recall and NDCG against a brute-force count."""

from __future__ import annotations

import numpy as np
import pytest

from shardembed.recipes import metrics
from shardembed.recipes.metrics import History

ITEMS, USERS = 30, 40


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray], History]:
    """(counts, scores, held-out items, histories as lists, the same as a History); histories repeat items, but not these."""
    rng = np.random.default_rng(0)
    held = rng.integers(ITEMS, size=USERS)
    drawn = [rng.integers(ITEMS, size=rng.integers(0, 8)) for _ in range(USERS)]
    histories = [history[history != item] for history, item in zip(drawn, held, strict=True)]
    owners = np.repeat(np.arange(USERS), [len(history) for history in histories])
    flat = np.concatenate(histories)
    return (
        rng.integers(5, size=ITEMS),
        rng.random((USERS, ITEMS)),
        held,
        histories,
        History(owners, flat),
    )


def brute_force(order: np.ndarray, held: int, history: np.ndarray) -> int:
    allowed = [item for item in order if item not in history]
    return allowed.index(held)


def test_positions_in_lists(case: tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray], History]) -> None:
    _, scores, held, histories, history = case
    orders = np.argsort(-scores, axis=1)
    expected = [brute_force(order, item, met) for order, item, met in zip(orders, held, histories, strict=True)]
    np.testing.assert_array_equal(metrics.positions_in_lists(orders, held, history, ITEMS), expected)
    # Lists cut after k + the longest history: the same wherever it counts.
    k = 5
    cut = metrics.positions_in_lists(orders[:, : k + 7], held, history, ITEMS)
    np.testing.assert_array_equal(np.minimum(cut, k), np.minimum(expected, k))
    part = metrics.positions_in_lists(orders[10:25], held[10:25], history.of(10, 25), ITEMS)
    np.testing.assert_array_equal(part, expected[10:25])


def test_positions_by_popularity(case: tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray], History]) -> None:
    counts, _, held, histories, history = case
    order = np.array(sorted(range(ITEMS), key=lambda item: (-counts[item], item)))
    expected = [brute_force(order, item, met) for item, met in zip(held, histories, strict=True)]
    found = metrics.positions_by_popularity(metrics.popularity_ranks(counts), held, history)
    np.testing.assert_array_equal(found, expected)


def test_who_met_the_held_out_item_is_not_asked() -> None:
    history = History(np.array([0, 0, 1, 3, 3]), np.array([4, 5, 4, 7, 4]))
    asked = metrics.unmet(np.array([5, 5, 4, 6]), history, 8)
    assert asked.tolist() == [False, True, True, True]
    left = history.only(asked)  # users 1, 2 and 3 are now 0, 1 and 2
    assert (left.owners.tolist(), left.items.tolist()) == ([0, 2, 2], [4, 7, 4])
    nobody = history.only(np.zeros(4, bool))
    assert (len(nobody.owners), len(nobody.items)) == (0, 0)


def test_scores() -> None:
    total = metrics.score(np.array([0, 2, 20]), 20) + metrics.score(np.array([19, 300]), 20)
    assert total.recall == 3 / 5
    assert total.ndcg == pytest.approx((1 + 1 / 2 + 1 / np.log2(21)) / 5)
    assert metrics.Score().recall == 0.0


def test_users_without_lists_are_no_trouble() -> None:
    nobody = np.empty(0, np.int64)
    history = History(nobody, nobody)
    assert len(metrics.positions_in_lists(np.empty((0, 5), np.int64), nobody, history, ITEMS)) == 0
    assert len(metrics.positions_by_popularity(np.arange(ITEMS), nobody, history)) == 0
