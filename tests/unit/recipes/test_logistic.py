"""The baseline for clicks is the logistic regression that its equations say, on rows that are trained on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from shardembed.comm.comm import Comm
from shardembed.recipes import logistic
from shardembed.recipes.ctr_config import CtrDataConfig
from shardembed.recipes.ctr_evaluate import Baselines, ClickEvaluation
from shardembed.recipes.ctr_metrics import measure
from shardembed.recipes.data.clicks.encode import Encoder
from shardembed.recipes.data.clicks.rows import Clicks, concatenate
from shardembed.recipes.data.clicks.scan import scan

CPU = torch.device("cpu")


def config(**values: object) -> CtrDataConfig:
    small = {"integers": ("I1", "I2"), "categories": ("C1", "C2"), "ids": {"num_embeddings": 1000}}
    return CtrDataConfig.model_validate({**small, "generator": {"rows": 30_000, "max_cardinality": 300, "strength": 1.0}, **values})


def test_it_is_where_the_penalised_likelihood_is_highest() -> None:
    settings = config()
    data = scan(settings, Comm.of())
    found = logistic.fit(data, Encoder.of(settings), Comm.of())
    assert list(found.values) == ["C1"]  # C2 has 300 values
    rows = concatenate(list(data.training()))
    # An independent way to the same place: the gradient of torch's loss vanishes there.
    encoder = Encoder.of(settings)
    numbers = torch.from_numpy(np.nan_to_num(np.log1p(np.maximum(np.nan_to_num(rows.numbers), 0)))).double()
    hashed = torch.from_numpy(encoder.tables[0].of(rows))
    ones = torch.stack([hashed == value for value in hashed.unique()], 1).double()
    features = torch.cat([numbers, ones], 1)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    weights = torch.from_numpy(found.weights).clone().requires_grad_()
    z = weights[0] + features @ weights[1:]
    torch.nn.functional.softplus(z).sum().sub((z * torch.from_numpy(rows.labels)).sum()).add(
        weights[1:].square().sum() / 2
    ).backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() < 1e-5 * len(rows)
    np.testing.assert_allclose(found.logits(rows), z.detach().numpy(), rtol=1e-5, atol=1e-5)
    assert found.rate == pytest.approx(rows.labels.mean())


def test_a_sample_has_no_row_for_validation_and_about_as_many_as_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(split={"kind": "last", "fraction": 0.5})
    data = scan(settings, Comm.of())
    monkeypatch.setattr(logistic, "SAMPLE", 2000)
    found = logistic._sample(data, Comm.of())
    assert 1800 < len(found) < 2200
    trained = {row.tobytes() for row in concatenate(list(data.training())).numbers}
    assert all(row.tobytes() in trained for row in found.numbers[:50])
    monkeypatch.setattr(logistic, "READ", 20_000)
    monkeypatch.setattr(logistic, "SAMPLE", 1 << 30)
    assert 14_000 < len(logistic._sample(data, Comm.of())) <= 15_000


def test_rows_of_one_kind_and_columns_without_a_value_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "all.txt"
    path.write_text("".join(f"1\t\t{row}\t\t{row % 5:x}\n" for row in range(40)))
    settings = config(path=(str(path),))
    data = scan(settings, Comm.of())
    found = logistic.fit(data, Encoder.of(settings), Comm.of())
    assert np.isfinite(found.logits(concatenate(list(data.training())))).all()
    nothing = Clicks(np.empty(0, np.int8), np.empty((0, 2), np.float32), np.empty((0, 2), np.int64))
    assert found.logits(nothing).shape == (0,)


def test_a_model_that_is_no_better_is_told() -> None:
    labels = np.array([0, 1] * 20, np.int8)
    good, bad = (labels * 2.0 - 1).astype(np.float32), np.full(40, 3.0, np.float32)
    loss = float(np.log(2))
    said = io.StringIO()
    simple = Baselines(measure(good, labels, Comm.of(), CPU), loss)
    ClickEvaluation(measure(bad, labels, Comm.of(), CPU), None, None, simple).show(Console(file=said, width=200))
    assert "AUC                 0.5000 (logistic regression: 1.0000)" in said.getvalue()
    assert "the model ranks no better than logistic regression" in said.getvalue()
    assert "its log loss is no better than that of the share of clicks" in said.getvalue()
    said = io.StringIO()
    beaten = Baselines(measure(bad, labels, Comm.of(), CPU), loss)
    evaluation = ClickEvaluation(measure(good, labels, Comm.of(), CPU), None, None, beaten)
    evaluation.show(Console(file=said, width=200))
    assert "no better" not in said.getvalue()
    assert evaluation.to_json()["base_log_loss"] == loss
    assert evaluation.to_json()["logistic_auc"] == 0.5
