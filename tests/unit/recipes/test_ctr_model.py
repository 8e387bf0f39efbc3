"""Models that predict clicks: what they compute, what their metrics are, learning rates, and what the generator plants."""

from __future__ import annotations

import math
from math import nan

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.recipes.common import EvaluationConfig, ScheduleConfig
from shardembed.recipes.ctr_config import CtrDataConfig, CtrModelConfig, PlantedConfig
from shardembed.recipes.ctr_evaluate import ClickEvaluation
from shardembed.recipes.ctr_metrics import auc, measure, probabilities
from shardembed.recipes.data.clicks.encode import ClickBatch, Encoder
from shardembed.recipes.data.clicks.rows import Clicks, concatenate
from shardembed.recipes.data.clicks.scan import scan
from shardembed.recipes.data.criteo.planted import PlantedClicks
from shardembed.recipes.data.criteo.schema import Schema
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.models.ctr import ClickModel, Cross, Dots
from shardembed.recipes.rates import factor
from shardembed.recipes.saving import Progress

CPU = torch.device("cpu")


def test_dots_are_the_products_of_every_two_vectors() -> None:
    vectors = torch.randn(3, 4, 5)
    dots = Dots(4, 5)
    found = dots(vectors)
    assert found.shape == (3, dots.width)
    torch.testing.assert_close(found[:, :5], vectors[:, 0])
    pairs = [(one, other) for one in range(4) for other in range(one)]
    expected = torch.stack([(vectors[:, one] * vectors[:, other]).sum(1) for one, other in pairs], dim=1)
    torch.testing.assert_close(found[:, 5:], expected)


def test_cross_layers_multiply_with_the_first() -> None:
    vectors = torch.randn(2, 3, 4)
    cross = Cross(3, 4, 2, 5)
    first = x = vectors.reshape(2, 12)
    for down, up in zip(cross.down, cross.up, strict=True):
        x = first * (x @ down.weight.T @ up.weight.T + up.bias) + x
    torch.testing.assert_close(cross(vectors), x)


def model_of(kind: str, autocast: torch.dtype | None = None, integers: int = 2) -> ClickModel:
    config = CtrModelConfig.model_validate({"kind": kind, "embedding_dim": 4, "bottom": (5,), "top": (6,)})
    settings = {"optimizer": se.optim.SGD(lr=0.1), "plan": {}, "wire_dtype": None, "seed": 0}
    columns = tuple(FeatureConfig(name=name, kind="id") for name in ("C1", "C2"))
    return ClickModel(config, integers, columns, {"C1": 7, "C2": 9}, autocast=autocast, **settings)


def batch_of(count: int, integers: int = 2) -> ClickBatch:
    rows = torch.stack([torch.arange(count) % 7, torch.arange(count) % 9])
    no_lists = torch.empty(0, dtype=torch.int64), torch.zeros(0, count + 1, dtype=torch.int64)
    return ClickBatch((torch.arange(count) % 2).float(), torch.rand(count, integers), rows, *no_lists, ("C1", "C2"), global_size=8)


@pytest.mark.parametrize("kind", ["dlrm", "dcnv2"])
def test_the_loss_is_the_batchs_and_bfloat16_is_near(kind: str) -> None:
    model, batch = model_of(kind), batch_of(8)
    logits = model.logits(batch)
    assert logits.dtype == torch.float32
    expected = -(batch.labels * torch.log(torch.sigmoid(logits)) + (1 - batch.labels) * torch.log(1 - torch.sigmoid(logits))).mean()
    torch.testing.assert_close(model(batch), expected)
    narrow = model_of(kind, torch.bfloat16)
    narrow.load_state_dict(model.state_dict(), strict=False)
    found = narrow.logits(batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, logits, atol=0.02, rtol=0.05)
    assert not torch.equal(found, logits)
    assert model(batch_of(0)).item() == 0.0  # a rank without samples
    assert model_of(kind, integers=0).logits(batch_of(3, 0)).shape == (3,)


@pytest.mark.parametrize("ties", [0, 1, 3])
def test_metrics_are_the_textbooks(ties: int) -> None:
    rng = np.random.default_rng(ties)
    logits = rng.normal(size=500).astype(np.float32)
    if ties:
        logits = np.round(logits, ties - 1)
    labels = (rng.random(500) < 1 / (1 + np.exp(-logits))).astype(np.int8)
    found = measure(logits, labels, Comm.of(), CPU)
    assert found.auc == pytest.approx(float(binary_auroc(torch.tensor(logits).double(), torch.tensor(labels).int())), abs=1e-6)
    loss = float(torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), torch.tensor(labels).float()))
    rate = labels.mean()
    assert (found.rows, found.log_loss, found.click_rate) == (500, pytest.approx(loss, rel=1e-6), pytest.approx(rate))
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert found.normalized_entropy == pytest.approx(loss / entropy, rel=1e-6)
    assert found.calibration == pytest.approx(torch.sigmoid(torch.tensor(logits)).mean().item() / rate, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_probabilities_of_log_odds_do_not_overflow_on_the_way() -> None:
    found = probabilities(np.array([-1e4, -100, 0, 2, 100, 1e4], np.float32))
    np.testing.assert_allclose(found, [0, math.exp(-100), 0.5, 1 / (1 + math.exp(-2)), 1, 1], rtol=1e-6)


def test_metrics_that_are_not_defined_are_none() -> None:
    nothing = measure(np.empty(0, np.float32), np.empty(0, np.int8), Comm.of(), CPU).to_json()
    assert nothing == {"rows": 0, **dict.fromkeys(("auc", "normalized_entropy", "log_loss", "click_rate", "calibration"))}
    assert measure(np.ones(3, np.float32), np.ones(3, np.int8), Comm.of(), CPU).to_json()["auc"] is None
    assert (
        ClickEvaluation(measure(np.ones(3, np.float32), np.ones(3, np.int8), Comm.of(), CPU), math.nan).to_json()["generator_auc"]
        is None
    )
    assert np.isnan(auc(np.array([np.nan, 1], np.float32), np.array([0, 1]), Comm.of(), CPU))
    assert auc(np.array([0.0, -0.0], np.float32), np.array([0, 1]), Comm.of(), CPU) == 0.5


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({}, {0: 1, 99: 1}),
        ({"warmup_steps": 10}, {0: 0.1, 4: 0.5, 9: 1, 10: 1, 99: 1}),
        ({"warmup_steps": 20, "decay": "linear", "final": 0.2}, {19: 1, 20: 1, 60: 0.6, 100: 0.2}),
        ({"decay": "cosine"}, {0: 1, 50: 0.5, 100: 0}),
    ],
)
def test_learning_rates_follow_their_schedule(schedule: dict[str, object], expected: dict[int, float]) -> None:
    config = ScheduleConfig.model_validate(schedule)
    for step, wanted in expected.items():
        assert factor(config, step, 100) == pytest.approx(wanted), step


def test_training_stops_after_evaluations_that_are_no_better() -> None:
    config = EvaluationConfig(every_steps=1, patience=2, min_gain=0.1)
    progress = Progress()
    seen = []
    for score in (0.5, 0.55, 0.7, 0.75, 0.79):
        progress = progress.with_score(score, config)
        seen.append((progress.best, progress.waited, progress.stopped))
    assert seen == [(0.5, 0, False), (0.5, 1, False), (0.7, 0, False), (0.7, 1, False), (0.7, 2, True)]


def test_any_evaluation_is_better_than_one_without_a_result() -> None:
    config = EvaluationConfig(every_steps=1, patience=2)
    progress = Progress()
    for score, waited in ((nan, 0), (nan, 1), (0.5, 0), (nan, 1), (0.6, 0)):
        progress = progress.with_score(score, config)
        assert progress.waited == waited
    assert progress.best == 0.6


def test_planted_clicks_follow_their_model() -> None:
    schema = Schema.of(CtrDataConfig())
    source = PlantedClicks(PlantedConfig(rows=70_000, max_cardinality=100), schema)
    assert len(source.parts) == 2
    clicks = concatenate([chunk for part in range(len(source.parts)) for chunk in source.chunks(part)])
    assert len(clicks) == 70_000
    known = source.probabilities(clicks)
    # Among rows of about the same probability, so many are clicks.
    for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0)):
        rows = (known >= low) & (known < high)
        error = np.sqrt((known[rows] * (1 - known[rows])).sum()) / rows.sum()
        assert abs(clicks.labels[rows].mean() - known[rows].mean()) < 4 * error
    counts = np.sort(np.unique(clicks.ids[:, -1], return_counts=True)[1])[::-1]
    assert counts[0] / counts[9] == pytest.approx(10**1.1, rel=0.2)  # Zipf
    other = PlantedClicks(PlantedConfig(rows=70_000, max_cardinality=100, seed=1), schema)
    assert not np.array_equal(next(iter(other.chunks(0))).ids, clicks.ids[:16384])


@pytest.mark.parametrize("kind", ["hash", "vocabulary"])
def test_categories_become_rows_and_missing_ones_row_0(kind: str) -> None:
    ids = {"num_embeddings": 50, "tables": {"C2": 60}} if kind == "hash" else {"min_count": 30, "max_size": 10}
    config = CtrDataConfig.model_validate({"ids": {"kind": kind, **ids}, "generator": {"rows": 2000, "max_cardinality": 200}})
    data = scan(config, Comm.of())
    encoder = Encoder.of(config, data.vocabularies)
    clicks = Clicks(np.array([1], np.int8), np.array([[np.nan, -2, 4, *[0] * 10]], np.float32), np.full((1, 26), MISSING))
    batch = encoder(clicks, 1)
    assert {int(rows) for rows in batch.ids.values()} == {0}
    torch.testing.assert_close(batch.dense[0, :3], torch.tensor([0, 0, np.log(5)], dtype=torch.float32))
    counts = encoder.counts(data.training())
    assert [len(one) for one in counts] == list(encoder.sizes.values())
    assert all(one.sum() == data.training_rows for one in counts)
    if kind == "hash":
        assert tuple(encoder.sizes.values()) == (50, 60, *[50] * 24)
        assert counts[0][0] == 0  # nothing of C1 is missing
        assert counts[2][0] > 0
    else:
        assert max(encoder.sizes.values()) == 11
        assert min(data.vocabularies[-1].counts) >= 30
        assert counts[-1][0] > 0
