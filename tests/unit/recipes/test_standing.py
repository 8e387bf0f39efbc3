"""What is said of how good a model is: beside what, whether it is better, whether it overfits, and whether chances come true."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shardembed.comm.comm import Comm
from shardembed.recipes import reliability, standing
from shardembed.recipes.calibration import calibration_bins
from shardembed.recipes.series import Point, Series

CPU = torch.device("cpu")
RANKED = {"ndcg@10": 0.2, "recall@10": 0.4, "popularity_recall@10": 0.3, "popularity_ndcg@10": 0.2, "generator_recall@10": 0.5}
CLICKED = {"auc": 0.7, "log_loss": 0.4, "click_rate": 0.1, "calibration": 1.1, "base_log_loss": 0.39, "some_new_one_auc": 0.6}


def test_a_number_of_somebody_else_stands_beside_the_model_s() -> None:
    assert standing.metrics(RANKED) == ["ndcg@10", "recall@10"]
    assert standing.headline(RANKED) == "recall@10"
    found = standing.beside(RANKED)
    assert [(one.who, one.value, one.baseline) for one in found["recall@10"]] == [
        ("popular items", 0.3, True),
        ("what made the data", 0.5, False),
    ]
    assert [name for name, _ in standing.beaten(RANKED)] == ["ndcg@10"], "as good is not better"
    assert standing.metrics(CLICKED) == ["auc", "log_loss", "calibration"]
    assert [one.who for one in standing.beside(CLICKED)["auc"]] == ["some new one"], "chance is left out where there is better"
    assert [(name, one.who) for name, one in standing.beaten(CLICKED)] == [("log_loss", "the share of clicks")]
    assert standing.headline({}) is None
    assert standing.headline({"x": 1.0}) == "x"


def test_what_follows_from_a_metric_is_a_baseline() -> None:
    results = {"auc": 0.49, "normalized_entropy": 1.01}
    assert [(name, one.who, one.value) for name, one in standing.beaten(results)] == [
        ("auc", "chance", 0.5),
        ("normalized_entropy", "the share of clicks", 1.0),
    ]
    assert not standing.beaten({"auc": 0.51, "normalized_entropy": 0.99})


@pytest.mark.parametrize(
    ("name", "value", "than", "is_better"),
    [("auc", 0.6, 0.5, True), ("log_loss", 0.6, 0.5, False), ("calibration", 0.95, 1.1, True), ("auc", 0.5, 0.5, False)],
)
def test_which_value_is_better_is_the_metric_s_to_say(name: str, value: float, than: float, is_better: bool) -> None:
    assert standing.better(name, value, than) is is_better


def curve(*values: float) -> list[Point]:
    return [Point(100 * (place + 1), 1, value, value, value) for place, value in enumerate(values)]


def losses(*values: float) -> Series:
    """A value for each hundred steps."""
    found = Series()
    for step in range(100 * len(values)):
        found.add(step + 1, values[step // 100])
    return found


@pytest.mark.parametrize(
    ("name", "values", "loss", "best"),
    [
        ("auc", (0.7, 0.8, 0.793), (3, 2, 1), 200),
        ("auc", (0.7, 0.8, 0.795), (3, 2, 1), None),  # 2 % of what it is above 0.5 is 0.006
        ("recall@10", (0.4, 0.391), (2, 1), 100),
        ("recall@10", (0.4, 0.393), (2, 1), None),
        ("log_loss", (0.4, 0.41), (2, 1), 100),
        ("log_loss", (0.41, 0.4), (2, 1), None),
        ("auc", (0.7, 0.8, 0.6), (3, 1, 2), None),  # the loss grew: what goes wrong is something else
        ("auc", (0.7, 0.8, 0.6, 0.79), (4, 3, 2, 1), 200),
        ("auc", (0.7, 0.8, 0.6, 0.81), (4, 3, 2, 1), None),
        ("auc", (0.8,), (1,), None),
        ("auc", (), (), None),
    ],
)
def test_overfitting_has_a_rule(name: str, values: tuple[float, ...], loss: tuple[float, ...], best: int | None) -> None:
    found = standing.overfit(name, curve(*values), losses(*loss))
    assert (found and found.step) == best
    if found is not None and best is not None:
        assert found.loss == loss[best // 100 - 1]
        assert found.last_loss == loss[-1]
        assert found.steps == min(best, 100 * len(values) - best) // 2


def test_a_smoothed_curve_is_of_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=200)
    points = [Point(step, 1 + step % 2, (1 + step % 2) * value, value, value) for step, value in enumerate(values.tolist())]
    found = standing.smoothed(points)
    assert [point.step for point in found] == list(range(200))
    near, weights = values[90:101], 1 + np.arange(90, 101) % 2
    assert found[95].mean == pytest.approx((near * weights).sum() / weights.sum())
    assert found[0].count == sum(point.count for point in points[:6])
    assert standing.smoothed(points[:10]) == [Point(p.step, p.count, p.total, p.mean, p.mean) for p in points[:10]]


def drawn(rows: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    logits = rng.normal(-2, 1.5, rows).astype(np.float32)
    return logits, (rng.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int8)


def test_bins_are_of_neighbours_and_have_as_many_rows() -> None:
    logits, labels = drawn(50_000)
    found = calibration_bins(logits, labels, Comm.of(), CPU)
    assert found is not None
    assert sum(found["rows"]) == 50_000
    assert len(found["rows"]) == 20
    assert max(found["rows"]) < 1.1 * 50_000 / 20
    order = np.argsort(logits, kind="stable")
    chances = 1 / (1 + np.exp(-logits[order].astype(np.float64)))
    for place, (predicted, observed, rows) in enumerate(zip(found["predicted"], found["observed"], found["rows"], strict=True)):
        part = slice(sum(found["rows"][:place]), sum(found["rows"][:place]) + rows)
        # The rows of a bin are a stretch of all, but for those within a step of the grid at its ends.
        assert predicted == pytest.approx(chances[part].mean(), rel=1e-9)
        assert observed == pytest.approx(labels[order][part].mean(), abs=1 / 128 * 2)
    assert sum(p * r for p, r in zip(found["predicted"], found["rows"], strict=True)) == pytest.approx(chances.sum())
    assert sum(o * r for o, r in zip(found["observed"], found["rows"], strict=True)) == pytest.approx(labels.sum())
    bins = reliability.bins_of({"calibration_bins": found})
    assert reliability.off(bins) <= 4, "one of twenty is expected"
    shifted = [reliability.Bin(2 * each.predicted / (1 + each.predicted), each.observed, each.rows) for each in bins]
    assert reliability.off(shifted) == 20


def test_bins_of_few_or_no_or_lost_predictions() -> None:
    same = calibration_bins(np.full(7, -1.0, np.float32), np.array([1, 0, 0, 0, 0, 0, 0]), Comm.of(), CPU)
    assert same == {"predicted": [pytest.approx(1 / (1 + math.e))], "observed": [pytest.approx(1 / 7)], "rows": [7]}
    assert calibration_bins(np.empty(0, np.float32), np.empty(0, np.int8), Comm.of(), CPU) is None
    assert calibration_bins(np.array([np.nan, 1], np.float32), np.array([0, 1]), Comm.of(), CPU) is None
    far = calibration_bins(np.array([-np.inf, np.inf, 99], np.float32), np.array([0, 1, 1]), Comm.of(), CPU)
    assert far == {"predicted": [0.0, 1.0], "observed": [0.0, 1.0], "rows": [1, 2]}


@pytest.mark.parametrize(
    "bins",
    [
        [(0.0, 0.0, 1)],
        [(1.0, 1.0, 5), (1.0, 0.0, 5)],
        [(1e-300, 0.0, 3), (0.9, 1.0, 4)],
        [(0.001, 0.0, 3), (0.5, 0.4, 4)],
        [(0.2, 0.2, 10**12), (0.3, 0.31, 10**12)],
    ],
)
def test_any_bins_can_be_drawn(bins: list[tuple[float, float, int]]) -> None:
    from xml.etree import ElementTree

    text = reliability.chart([reliability.Bin(*each) for each in bins], "a & b")
    circles = list(ElementTree.fromstring(text).iter("circle"))
    assert len(circles) == len(bins)
    for each in circles:
        assert 0 <= float(each.get("cx", "nan")) <= reliability.WIDTH
        assert 0 <= float(each.get("cy", "nan")) <= reliability.HEIGHT + 60
    assert "nan" not in text
