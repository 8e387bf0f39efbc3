"""The training job computes the same on any number of ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import shardembed as se
from shardembed.errors import DataError
from shardembed.recipes import train
from shardembed.recipes.common import RankingConfig
from shardembed.recipes.config import (
    Config,
    DataConfig,
    GeneratorConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.interactions import scan
from shardembed.recipes.ids_config import InteractionIdsConfig
from shardembed.recipes.split_config import RankingSplitConfig
from tests.amount import exhaustive
from tests.harness import run_ranks

GENERATED = GeneratorConfig(users=150, items=80, interactions=1500, tastes=5)


def summary_of(rank: int, world_size: int, run_dir: str, towers: tuple[int, ...], batch_size: int, plan: str) -> dict[str, Any]:
    config = Config(
        name="test",
        data=DataConfig(generator=GENERATED),
        model=ModelConfig(embedding_dim=8, negatives=32, towers=towers),
        train=TrainConfig(epochs=3, global_batch_size=batch_size, max_steps=25),
        plan=PlanConfig.model_validate({"user": plan, "item": plan}),
        eval=RankingConfig(k=5),
        run_dir=run_dir,
    )
    return train.run(config, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("towers", "batch_size", "plan"),
    [
        exhaustive((), 100, "row_wise"),
        ((), 100, "column_wise"),
        ((6,), 101, "auto"),
        exhaustive((6,), 2, "row_wise"),
    ],  # of 2, a third rank gets none
)
def test_losses_and_metrics_do_not_depend_on_the_number_of_ranks(
    tmp_path: Path, towers: tuple[int, ...], batch_size: int, plan: str
) -> None:
    alone = run_ranks(1, summary_of, str(tmp_path), towers, batch_size, plan)[0]
    assert len(alone["losses"]) == 20
    assert recall_of_export(alone, tmp_path / "vectors", "model", 5) == alone["recall@5"]
    for ranks in (2, 3):
        found = run_ranks(ranks, summary_of, str(tmp_path), towers, batch_size, plan)
        assert [summary["run_dir"] is None for summary in found] == [False] + [True] * (ranks - 1)
        vectors = tmp_path / f"vectors-of-{ranks}"
        assert recall_of_export(found[0], vectors, "model", 5) == found[0]["recall@5"]
        if towers:
            assert_neighbors_are_the_models(Path(found[0]["run_dir"]), np.load(vectors / "tables.item.npy"))
        for summary in found:
            assert summary["losses"] == pytest.approx(alone["losses"], rel=1e-4)
            for name in ("recall@5", "ndcg@5", "popularity_recall@5", "popularity_ndcg@5", "evaluated_users", "steps"):
                assert summary[name] == pytest.approx(alone[name], rel=2e-2), name


def recall_of_export(summary: dict[str, Any], out: Path, vectors: Any, k: int) -> float:
    """Recall by dot products of exported vectors in NumPy."""
    done = se.export_tables(summary["run_dir"], out, format="npy", vectors=vectors)
    assert [(table.vectors, table.metric) for table in done.tables] == [(vectors, "dot")] * 2
    users, items = (np.load(out / f"tables.{name}.npy") for name in ("user", "item"))
    data = scan(GeneratedInteractions(GENERATED), 0)
    hits = 0
    for user, held in zip(data.held.users, data.held.items, strict=True):
        scores = items @ users[user]
        scores[data.histories(np.array([user])).items] = -np.inf
        hits += held in np.argsort(-scores)[:k]
    return hits / len(data.held.users)


def assert_neighbors_are_the_models(run: Path, items: np.ndarray) -> None:
    scores = items.astype(np.float64) @ items[7].astype(np.float64)
    scores[7] = -np.inf
    nearest = np.argsort(-scores)[:5]
    assert list(se.neighbors(run, "item", [7], 5)[0].ids) == nearest.tolist()
    rows = se.neighbors(run, "item", [7], 5, metric="dot", vectors="rows")[0]
    assert rows.scores != pytest.approx(scores[nearest], rel=1e-3), "without its tower it is another vector"


def refused(rank: int, world_size: int, settings: Config) -> str:
    with pytest.raises(DataError) as caught:
        train.run(settings, Console(file=io.StringIO()))
    return str(caught.value)


def test_ids_that_no_memory_is_taken_for_end_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "ids.csv"
    path.write_text("user_id,item_id\n2147483648,0\n2147483649,1\n")
    settings = Config(data=DataConfig(path=(str(path),), ids=InteractionIdsConfig(kind="numbered")), run_dir=str(tmp_path))
    assert len(set(told := run_ranks(2, refused, settings))) == 1
    assert told[0].startswith(f"{path}:3: column 'user_id': id 2,147,483,649 is the largest of only 2 rows")


def test_the_result_is_of_other_interactions_than_those_that_choose_the_weights(tmp_path: Path) -> None:
    found = {}
    for validates in (False, True):
        settings = Config(
            name="test",
            data=DataConfig(generator=GENERATED, split=RankingSplitConfig(kind="leave_one_out", validation=validates)),
            model=ModelConfig(embedding_dim=8, negatives=32),
            train=TrainConfig(epochs=3, global_batch_size=200),
            eval=RankingConfig(k=5),
            run_dir=str(tmp_path),
        )
        summary = run_ranks(1, result_of, settings)[0]
        lines = (Path(summary["run_dir"]) / "metrics.jsonl").read_text().splitlines()
        during = [line["evaluation"] for line in map(json.loads, lines) if "evaluation" in line]
        assert len(during) == 3
        best = max(during, key=lambda one: one["recall@5"])
        found[validates] = {name: summary[name] for name in best}, best
    result, best = found[False]
    assert result == pytest.approx(best), "one set of held-out interactions for both"
    result, best = found[True]
    assert result["popularity_recall@5"] != best["popularity_recall@5"], "the questions are others"


def result_of(rank: int, world_size: int, settings: Config) -> dict[str, Any]:
    return train.run(settings, Console(file=io.StringIO()))
