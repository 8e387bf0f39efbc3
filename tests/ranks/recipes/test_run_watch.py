"""What a run on several ranks records for its page, and what looking costs in collectives."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import shardembed as se
from shardembed.recipes import recorded, run_sections, train, watch
from shardembed.recipes.common import CheckpointConfig, LogConfig
from shardembed.recipes.config import Config, DataConfig, GeneratorConfig, ModelConfig, PlanConfig, RankingConfig, TrainConfig
from shardembed.recipes.run_folder import OBSERVED, PAGE
from tests.harness import run_ranks
from tests.unit.pages import stands_alone

STEPS, SAVES = 26, 22  # losses are shared after step 20 too, in the middle of a look


def run(rank: int, world_size: int, run_dir: str, page: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """The summary, and the collectives."""
    config = Config(
        name="test",
        data=DataConfig(generator=GeneratorConfig(users=150, items=80, interactions=1500, tastes=5)),
        model=ModelConfig(embedding_dim=8, negatives=32),
        train=TrainConfig(epochs=3, global_batch_size=100, max_steps=STEPS),
        plan=PlanConfig.model_validate({"user": "row_wise", "item": {"kind": "table_wise", "rank": 1}}),
        checkpoint=CheckpointConfig(every_steps=SAVES),
        eval=RankingConfig(k=5),
        log=LogConfig(page=page),
        run_dir=run_dir,
    )
    tally = se.Comm.of().tally
    tally.clear()
    return train.run(config, Console(file=io.StringIO())), tally.operations()


def test_all_ranks_are_on_the_page_and_a_look_takes_two_gathers(tmp_path: Path) -> None:
    watched = run_ranks(2, run, str(tmp_path / "with"), True)
    plain = run_ranks(2, run, str(tmp_path / "without"), False)
    assert watched[0][0]["losses"] == plain[0][0]["losses"]
    more = {name: count - plain[0][1].get(name, 0) for name, count in watched[0][1].items()}
    # At the checkpoint and at the end: texts of `profile` and of `memory`, each after their sizes.
    assert {name: count for name, count in more.items() if count} == {"all_to_all": 2 * 2 * 2}
    folder = Path(watched[0][0]["run_dir"])
    look = json.loads((folder / OBSERVED).read_text())["look"]
    profile = look["profile"]
    assert (look["step"], profile["steps"], profile["world_size"]) == (STEPS, STEPS - SAVES - watch.SETTLED, 2)
    assert look["memory"]["samples"] == 50
    read = [rank["rows"] for rank in profile["ranks"]]
    assert read[1] > read[0] > 0  # of the user table both have rows, of the item table rank 1 alone
    text = (folder / PAGE).read_text()
    stands_alone(text)
    assert f"rows read a step {max(read) / (sum(read) / 2):.2f}" in text
    assert "whole on rank 1" in text


@pytest.mark.parametrize(
    ("saves", "evaluates", "begun", "looked_at"),
    [
        (20, None, 0, {*range(12, 20), 23, 24}),
        (22, None, 0, {*range(14, 22)}),  # and none of the last three steps, which wait for the save
        (20, 3, 0, {18, 19, 24}),
        (2, None, 0, {*range(1, 24, 2)}),
        (None, None, 24, {24}),
        (20, None, 20, {23, 24}),
    ],
)
def test_looks_keep_off_first_steps_saves_and_evaluations(
    saves: int | None, evaluates: int | None, begun: int, looked_at: set[int]
) -> None:
    one = object.__new__(watch.Watch)
    one._saves, one._evaluates, one._last, one._begun = saves, evaluates, 25, begun
    assert {step for step in range(begun, 25) if one._is_near(step, one._end(step))} == looked_at


def test_of_many_ranks_the_busiest_are_shown() -> None:
    count = 100
    start = {"held": [{"rows": 10, "weights": 64, "state": 0}] * count}
    ranks = [{"seconds": 1.0, "bytes": 8.0, "rows": float(rank)} for rank in range(count)]
    made = recorded.Recorded(Path("x"), "", None, recorded.series.Curves(), None, [start], {"profile": {"ranks": ranks}}, None)
    text = run_sections.ranks(made)
    assert text.count("<tr>") == 1 + run_sections.MAX_RANKS
    assert '<td class="n">99</td>' in text
    assert '<td class="n">67</td>' not in text
    assert "the 32 busiest are shown, of 100" in text
    assert "rows read a step 2.00" in text
