"""What is predicted of a whole step and an epoch: the sums, and where they are said."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shardembed.cli import main
from shardembed.config.console import console_for
from shardembed.planner import page, report, sweep, topology, whole, workload
from shardembed.planner.cost_ops import all_reduce
from shardembed.planner.dense import Dense
from shardembed.planner.result import Planned
from tests.unit.pages import stands_alone
from tests.unit.planner.planned import made_up

SHOP = """
global_batch_size: 4096
{more}
tables:
  - {{name: users, num_embeddings: 20000, embedding_dim: 8, ids_per_sample: [1]}}
"""
DENSE = "dense: {parameters: 1_000_000, samples: 512, ms: 1.5}\nsamples_per_epoch: 1_000_000"


def told(ranks: int = 8, **changes: Any) -> Planned:
    """A made-up plan on real links, of a model that says what its dense part is."""
    planned = made_up(ranks)
    values = {"dense": Dense(1e-6, 2_000_000), "samples": 655_361, **changes}
    return replace(planned, workload=replace(planned.workload, **values), topology=topology.load("h100x8", ranks))


def test_a_whole_step_is_the_sum_of_its_parts() -> None:
    planned = told()
    found = whole.of(planned, 3.0)
    assert found.tables == planned.estimate.step_seconds
    assert found.dense == pytest.approx(65536 / 8 * 1e-6)
    exchange = all_reduce(planned.topology)
    assert found.reduced == pytest.approx(exchange.latency + 8_000_000 * (exchange.byte + planned.topology.ops["all_reduce"].byte))
    assert found.step == pytest.approx(found.tables + found.dense + found.reduced)
    assert found.memory == 4 * 2_000_000 * (1 + 1 + 2)
    assert found.steps == 11, "the last one is smaller"
    assert found.hours is not None
    assert found.hours == pytest.approx(11 * found.step / 3600)
    assert found.cost == pytest.approx(3.0 * 8 * found.hours)
    alone = whole.of(told(1))
    assert alone.reduced == 0, "nobody to sum with"
    assert alone.cost is None


def test_nothing_is_said_of_what_nobody_told() -> None:
    planned = made_up(8)
    assert whole.lines(planned) == []
    assert whole.of(planned).step == planned.estimate.step_seconds
    assert whole.as_json(planned)["epoch_hours"] is None
    text = page.render(planned)
    assert "With --dense-ms" in text
    assert "predicted whole step" not in text
    samples = whole.lines(told(dense=None))
    assert [(name, about) for name, _, about in samples] == [("an epoch", "predicted, of the tables alone; 11 steps")]
    assert [name for name, *_ in whole.lines(told(dense=Dense(0.0, 5)))] == [
        "its gradients",
        "whole step",
        "dense memory",
        "an epoch",
    ]


def test_every_number_is_on_the_page_and_in_the_report_and_is_called_a_prediction() -> None:
    planned = told()
    file = io.StringIO()
    report.show(console_for(file), planned, 3.0)
    text, shown = file.getvalue(), page.render(planned, None, price=3.0)
    assert max(map(len, text.splitlines())) <= report.WIDTH
    stands_alone(shown)
    for name, value, about in whole.lines(planned, 3.0):
        assert any(line.startswith(name) and value in line and about in line for line in text.splitlines()), name
        assert all(each in shown for each in (name, value, about))
        assert about.startswith("predicted") or name == "dense memory"
    assert "predicted cost of an epoch" in shown
    over = whole.lines(told(dense=Dense(1e-6, 10**12)))
    assert any("and is more than the 12.0 GiB kept for it" in about for _, _, about in over)


def test_a_sweep_weighs_whole_steps() -> None:
    """With a dense part that many ranks share, more of them are worth it; without, none are."""

    def plan(ranks: int) -> Planned:
        planned = told(ranks)
        slower = replace(planned.estimate, seconds=planned.estimate.seconds * (1 + ranks / 64))
        return replace(planned, estimate=slower)

    def bare(ranks: int) -> Planned:
        planned = plan(ranks)
        return replace(planned, workload=replace(planned.workload, dense=None, samples=None))

    found, plain = (sweep.Sweep("m", "t", 65536, sweep.run((8, 16, 32), each, 2.0)) for each in (plan, bare))
    fastest, few = sweep.answers(found), sweep.answers(plain)
    assert fastest is not None
    assert few is not None
    assert (fastest.fastest.ranks, few.fastest.ranks) == (32, 8)
    file = io.StringIO()
    sweep.show(console_for(file), found)
    assert file.getvalue().count(" an epoch, ") >= 3
    assert "the dense part included" in file.getvalue()
    assert found.cost(found.points[0]) == pytest.approx(8 * found.points[0].whole_seconds / 65536)
    shown, other = page.render(plan(8), found), page.render(bare(8), plain)
    assert '<th class="n">whole step</th><th class="n">an epoch</th><th class="n">its cost</th>' in shown
    assert "whole step</th>" not in other


@pytest.mark.parametrize(
    ("hours", "said"),
    [
        (1e-4, "360 ms"),
        (0.005, "18.0 s"),
        (0.2, "12.0 min"),
        (0.999, "1.00 h"),
        (2.345, "2.35 h"),
        (123.4, "123 h"),
        (12.34, "12.3 h"),
    ],
)
def test_hours_are_said_as_people_do(hours: float, said: str) -> None:
    assert whole.duration(hours) == said


def test_a_workload_file_says_it_too_and_the_command_line_goes_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(SHOP.format(more=DENSE))
    loaded = workload.load(path)
    assert loaded.dense == Dense(1e-3 * 1.5 / 512, 1_000_000)
    assert loaded.samples == 1_000_000
    words = ["plan", str(path), "--topology", "h100x8", "--ranks", "4", "--json", "--seconds", "0.2"]
    assert main(words) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["dense_seconds"] == pytest.approx(2 * 1.5e-3)
    assert plain["epoch_steps"] == 245
    assert plain["epoch_cost"] is None
    assert main([*words, "--dense-ms", "7", "--samples", "4096", "--cost-per-hour", "2", "--batch", "2048"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["dense_seconds"] == pytest.approx(7e-3)
    assert given["dense_memory_bytes"] == 16_000_000
    assert given["epoch_steps"] == 2
    assert given["epoch_cost"] == pytest.approx(2 * 4 * given["epoch_hours"])
    # In a sweep a rank's samples are those on the topology's eight ranks.
    assert main(["plan", str(path), "--topology", "h100x8", "--json", "--dense-ms", "7", "--sweep", "ranks=4,8"]) == 0
    four, eight = json.loads(capsys.readouterr().out)["points"]
    reduced = Dense(0.0, 1_000_000).reduced
    assert eight["dense_seconds"] == pytest.approx(7e-3 + reduced(topology.load("h100x8")))
    assert four["dense_seconds"] == pytest.approx(14e-3 + reduced(topology.load("h100x8", 4)))
    assert four["epoch_hours"] > eight["epoch_hours"]


@pytest.mark.parametrize(
    ("more", "words", "message"),
    [
        ("dense: {ms: 3}", [], "say of how many samples: add samples"),
        ("dense: {ms: 0, samples: 3}", [], "greater than 0"),
        ("dense: {flops: 3}", [], "flops"),
        ("samples_per_epoch: 0", [], "samples_per_epoch"),
        ("", ["--cost-per-hour", "3"], "add --samples N"),
        ("", ["--dense-ms", "-1"], "--dense-ms -1: must be above 0"),
        ("", ["--dense-ms", "nan"], "--dense-ms nan: must be above 0"),
        ("", ["--samples", "1", "--cost-per-hour", "inf"], "--cost-per-hour inf: must be above 0 and below 1e18"),
        ("", ["--dense-parameters", "0"], "--dense-parameters 0: must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, more: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(SHOP.format(more=more))
    assert main(["plan", str(path), "--topology", "h100x8", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
