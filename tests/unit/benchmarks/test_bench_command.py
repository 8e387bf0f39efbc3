"""`shardembed bench`: a tiny run on one rank, from its contenders to its page, and the pages of the other sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth, limits, report, startup, step, tasks, wire_bytes
from benchmarks.contenders import OURS
from benchmarks.options import Options
from benchmarks.roster import ONE_RANK
from shardembed import cli


@pytest.mark.exhaustive
def test_one_rank_runs_all_contenders_and_says_where_time_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "COPIED", 1 << 16)
    monkeypatch.setattr(limits, "GATHERED", 1 << 16)
    task = tasks.alike("tiny", 2, 50, 8, 4, 3)
    result = step.one(task, ONE_RANK, Options(rounds=1, steps=1, full=True))
    times = {name: values for heat in result["heats"] for name, values in heat.items()}
    assert {OURS, f"{OURS}, unique", f"{OURS}, Adam", f"{OURS}, FTRL", "nn.EmbeddingBag(sparse), torch Adagrad"} <= set(times)
    assert all(len(values) == 4 and min(values) > 0 for values in times.values()), times
    assert {"route", "lookup", "update"} <= {phase["name"] for phase in result["phases"]}
    assert all(phase["limit_ms"] > 0 for phase in result["phases"] if phase["name"] in ("lookup", "combine", "update"))
    page = tmp_path / "page.md"
    text = report.write(step, [result], ["bench", "step"], Options(), page)
    assert page.read_text() == text
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
    assert "2 tables, rows 100, columns 8, samples a rank 4" in text.lower()


def test_a_contender_that_fails_is_left_out_and_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise RuntimeError("no such kernel\nand a long story")

    monkeypatch.setattr(step.rounds, "take_turns", lambda contenders, *rest: {each.name: [1.0] for each in contenders})
    monkeypatch.setattr("benchmarks.peers.fbgemm", broken)
    task, options = tasks.alike("tiny", 1, 50, 8, 4, 3), Options(rounds=1, steps=1, only="FBGEMM")
    assert step.one(task, ONE_RANK, options)["left_out"] == {"FBGEMM TBE": "RuntimeError: no such kernel"}
    monkeypatch.setattr("benchmarks.roster.ours", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        step.one(task, ONE_RANK, options)


def test_the_fastest_variant_stands_for_a_peer() -> None:
    times = {
        OURS: [1.0, 2.0],
        "TorchRec": [4.0, 4.0],
        "TorchRec, as bags of one id": [3.0, 3.0],
        "TorchRec, bfloat16 wire": [1.0, 1.0],
    }
    result = {
        "workload": "w",
        "size": {"tables": 1},
        "ranks": 2,
        "kind": "row_wise",
        "heats": [times],
        "left_out": {"DTensor": "why"},
    }
    text = "\n".join(step.page([result], None))
    assert "| w | 2 | row-wise | 1.50 | TorchRec, as bags of one id | 3.00 | **2.25** (1.88 to 2.62) |" in text
    assert "- Left out: DTensor: why" in text


def test_the_page_of_bytes_compares_with_torchrec_and_the_formula() -> None:
    counted = {
        OURS: {"bytes": 51e6, "collectives": 4, "tally": 50e6, "formula": 50e6, "on the wire": 50e6},
        "TorchRec": {"bytes": 100e6, "collectives": 0, "tally": 0, "formula": 100e6},
    }
    wire = {"message": 400.0, "factor": 1.001, "reduce-scatter": 60e6}
    result = {
        "workload": "w",
        "size": {"tables": 1},
        "ranks": 2,
        "packings": {"bag": 1},
        "counted": counted,
        "left_out": {},
        "wire": wire,
    }
    text = "\n".join(wire_bytes.page([result], None))
    assert "| shardembed | 51.00 | **0.510** | 0.850 | 50.00 | 50.00 | +2.0% | 4 |" in text


def test_the_page_of_growth_has_a_slope_and_a_plot(tmp_path: Path) -> None:
    results = [
        {"quantity": "tables", "value": value, "ranks": 2, "times": {OURS: [value / 100]}, "left_out": {}}
        for value in (8, 100, 300)
    ]
    results += [{"quantity": "ranks", "value": 0, "ranks": ranks, "times": {OURS: [1.0]}, "left_out": {}} for ranks in (1, 2)]
    text = "\n".join(growth.page(results, tmp_path / "growth.md"))
    assert "shardembed on 2 rank(s) 10.0 us" in text
    assert "<svg" in (tmp_path / "growth.svg").read_text()


def test_the_page_of_startup_adds_the_stages() -> None:
    ours = {startup.TORCH: 0.75, "import": 1.0, "plan and build": 1.0, "first step": 0.5}
    theirs = {startup.TORCH: 0.75, "import": 4.0, "plan and build": 0.5, "first step": 0.5}
    text = "\n".join(startup.page([{"ranks": 2, "seconds": {"shardembed": [ours], "TorchRec": [theirs]}}], None))
    assert "| all | 2.50 (2.50 to 2.50) | 5.00 (5.00 to 5.00) | 0.50 (0.50 to 0.50) |" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--ranks", "2", "0"], "--ranks 2 0: each must be at least 1"),
        (["--kind", "diagonal"], "--kind diagonal: is none of row_wise"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_measured(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *words]) == 2
    assert said in capsys.readouterr().err
