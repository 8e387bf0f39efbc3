"""The two-tower model, its negatives and its evaluation, on one rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

import shardembed as se
from shardembed.recipes.build import build, placements
from shardembed.recipes.common import CheckpointConfig, RankingConfig
from shardembed.recipes.config import (
    Config,
    DataConfig,
    GeneratorConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.interactions import Interactions, scan
from shardembed.recipes.evaluate import chosen_users, evaluate
from shardembed.recipes.id_counts import IdCounts
from shardembed.recipes.models.index import ItemIndex
from shardembed.recipes.models.sampling import NegativeSampler
from shardembed.recipes.models.two_tower import Batch
from shardembed.recipes.rates import Rates
from shardembed.recipes.run_folder import RunFolder
from shardembed.recipes.runs import Run
from shardembed.recipes.saving import Progress
from shardembed.recipes.tasks import TwoTowerTask
from shardembed.recipes.tracking import Tracking
from shardembed.recipes.train import train

GENERATOR = GeneratorConfig(users=300, items=120, interactions=4000, tastes=6)


def config(**model: object) -> Config:
    return Config(
        data=DataConfig(generator=GENERATOR),
        model=ModelConfig(embedding_dim=8, negatives=16, **model),  # type: ignore[arg-type]
        train=TrainConfig(global_batch_size=100),
    )


@pytest.fixture(scope="module")
def data() -> Interactions:
    return scan(open_source(config().data), 0)


def test_negatives_follow_smoothed_popularity() -> None:
    counts = np.array([0, 1, 10, 100])
    sampler = NegativeSampler(counts, 200_000, seed=5)
    q = (counts + 1.0) ** 0.75
    q /= q.sum()
    drawn = sampler.draw(7)
    np.testing.assert_allclose(np.bincount(drawn.numpy(), minlength=4) / len(drawn), q, atol=5e-3)
    torch.testing.assert_close(sampler.log_expected, torch.from_numpy(np.log(200_000 * q)).float())
    assert torch.equal(drawn, NegativeSampler(counts, 200_000, seed=5).draw(7))
    assert not torch.equal(drawn, sampler.draw(8))
    assert not torch.equal(drawn, NegativeSampler(counts, 200_000, seed=6).draw(7))


def test_the_loss_is_the_sampled_softmax(data: Interactions) -> None:
    job = build(config(), data)
    users, items = torch.tensor([3, 5, 3]), torch.tensor([1, 2, 7])
    negatives = torch.tensor([2, 9, 9, 30])
    loss = job.model(Batch(users, items, negatives, global_size=6))
    tables = job.model.tables
    queries = F.normalize(tables.rows("user", users), dim=1) / 0.5
    total = 0.0
    for query, item in zip(queries, items, strict=True):
        positive = query @ tables.rows("item", item)
        logits = [positive]
        for negative in negatives:
            if negative != item:
                logits.append(query @ tables.rows("item", negative) - job.sampler.log_expected[negative])
        total += float(torch.stack(logits).logsumexp(0) - positive)
    assert loss.item() == pytest.approx(total / 6, rel=1e-5)


def test_a_batch_without_samples_has_loss_zero_and_a_backward(data: Interactions) -> None:
    job = build(config(towers=(4,)), data)
    nobody = torch.empty(0, dtype=torch.int64)
    loss = job.model(Batch(nobody, nobody, torch.arange(16), global_size=1))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in job.model.parameters())


@pytest.mark.parametrize("towers", [(), (12,)])
def test_retrieval_is_exact_and_evaluation_counts_it(data: Interactions, towers: tuple[int, ...]) -> None:
    settings = config(towers=towers)
    job = build(settings, data)
    model = job.model
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # towers start as the identity, which would hide a missing one
    with torch.no_grad():
        queries = model.queries(model.tables.rows("user", torch.arange(data.users)))
        vectors = model.item_tower(model.tables.rows("item", torch.arange(data.items)))
        scores = queries @ vectors.T
    found = ItemIndex(model).topk(torch.tensor([4, 9]), 5)
    torch.testing.assert_close(found, scores[[4, 9]].topk(5).indices)
    met = [set() for _ in range(data.users)]
    for chunk in data.training():
        for user, item in zip(chunk.users.tolist(), chunk.items.tolist(), strict=True):
            met[user].add(item)
    hits = 0
    for user, held in zip(data.held.users.tolist(), data.held.items.tolist(), strict=True):
        order = [item for item in scores[user].argsort(descending=True).tolist() if item not in met[user]]
        hits += held in order[:20]
    result = evaluate(ItemIndex(model), data.questions(), settings.eval, 0)
    assert result.model.users == result.popularity.users == len(data.held.users)
    assert result.model.found == hits


def test_a_sample_of_users_is_as_large_as_asked(data: Interactions) -> None:
    some = chosen_users(data.questions(), 50, seed=0)
    assert len(np.unique(some)) == 50
    assert set(some) <= set(data.held.users)
    assert evaluate(ItemIndex(build(config(), data).model), data.questions(), RankingConfig(users=50), 0).model.users == 50


def test_training_beats_popularity(data: Interactions, tmp_path: Path) -> None:
    settings = config().model_copy(
        update={
            "train": TrainConfig(epochs=8, global_batch_size=100),
            "checkpoint": CheckpointConfig(every_steps=None),
        }
    )
    job = build(settings, data)
    with RunFolder.make(tmp_path, "test", "") as folder:
        task = TwoTowerTask(settings, data)
        rates = Rates(job.optimizer, settings.train.schedule, task.steps)
        run, counts = Run(folder.path, folder, resumes=False), IdCounts(job.model.tables, 0)
        tracking = Tracking(run, settings, 0, lambda text: None)
        trained, last = train(job, task, Console(quiet=True), run, Progress(), rates, counts, tracking)
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert last is not None
    assert lines[-1]["evaluation"] == last.to_json()
    assert trained.step == len(losses) == 8 * -(-data.training_rows // 100)
    assert trained.samples == 8 * data.training_rows
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])
    result = evaluate(ItemIndex(job.model), data.questions(), RankingConfig(k=5), 0)
    assert result.model.recall > 2 * result.popularity.recall


def test_settings_become_core_objects() -> None:
    plan = PlanConfig.model_validate({"user": {"kind": "row_wise", "strided": True}, "item": {"kind": "table_wise", "rank": 0}})
    assert placements(Config(plan=plan)) == {"user": se.row_wise(strided=True), "item": se.table_wise(0)}
    assert placements(Config()) == {}
    settings = config().optimizer.tables.model_copy(update={"name": "Adam", "betas": (0.5, 0.9), "lr": 0.25})
    assert settings.build() == se.optim.Adam(lr=0.25, betas=(0.5, 0.9))
