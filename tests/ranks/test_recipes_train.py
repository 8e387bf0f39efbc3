"""The training job computes the same on any number of ranks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

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
from tests.harness import run_ranks


def summary_of(rank: int, world_size: int, run_dir: str, towers: tuple[int, ...], batch_size: int, plan: str) -> dict[str, Any]:
    config = Config(
        name="test",
        data=DataConfig(generator=GeneratorConfig(users=150, items=80, interactions=1500, tastes=5)),
        model=ModelConfig(embedding_dim=8, negatives=32, towers=towers),
        train=TrainConfig(epochs=3, global_batch_size=batch_size, max_steps=25),
        plan=PlanConfig.model_validate({"user": plan, "item": plan}),
        eval=RankingConfig(k=5),
        run_dir=run_dir,
    )
    return train.run(config, Console(file=io.StringIO()))


@pytest.mark.parametrize(
    ("towers", "batch_size", "plan"),
    [((), 100, "row_wise"), ((), 100, "column_wise"), ((6,), 101, "auto"), ((6,), 2, "row_wise")],  # of 2, a third rank gets none
)
def test_losses_and_metrics_do_not_depend_on_the_number_of_ranks(
    tmp_path: Path, towers: tuple[int, ...], batch_size: int, plan: str
) -> None:
    alone = run_ranks(1, summary_of, str(tmp_path), towers, batch_size, plan)[0]
    assert len(alone["losses"]) == 20
    for ranks in (2, 3):
        found = run_ranks(ranks, summary_of, str(tmp_path), towers, batch_size, plan)
        assert [summary["run_dir"] is None for summary in found] == [False] + [True] * (ranks - 1)
        for summary in found:
            assert summary["losses"] == pytest.approx(alone["losses"], rel=1e-4)
            for name in ("recall@5", "ndcg@5", "popularity_recall@5", "popularity_ndcg@5", "evaluated_users", "steps"):
                assert summary[name] == pytest.approx(alone[name], rel=2e-2), name


def refused(rank: int, world_size: int, settings: Config) -> str:
    with pytest.raises(DataError) as caught:
        train.run(settings, Console(file=io.StringIO()))
    return str(caught.value)


def test_ids_that_no_memory_is_taken_for_end_all_ranks(tmp_path: Path) -> None:
    path = tmp_path / "ids.csv"
    path.write_text("user_id,item_id\n2147483648,0\n2147483649,1\n")
    settings = Config(data=DataConfig(path=(str(path),)), run_dir=str(tmp_path))
    assert len(set(told := run_ranks(2, refused, settings))) == 1
    assert told[0].startswith(f"{path}:3: column 'user_id': id 2,147,483,649 is the largest of only 2 rows")
