"""`shardembed bench`: a tiny run on one rank, from its contenders to its page, and the pages of the other sets."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import dynamic, dynamic_step, growth, report, roster, split, startup, step, tasks, wire_bytes
from benchmarks.contenders import OURS
from benchmarks.crew import CrewError
from benchmarks.options import Options
from benchmarks.roster import ONE_RANK
from shardembed import cli

TINY = tasks.alike("tiny", 1, 50, 8, 4, 3)


@pytest.mark.exhaustive
def test_one_rank_runs_all_contenders_and_says_where_time_goes(tmp_path: Path) -> None:
    task = tasks.alike("tiny", 2, 50, 8, 4, 3)
    result = step.one(task, ONE_RANK, 1, Options(rounds=1, steps=2, full=True))
    times = {name: values for heat in result["heats"] for name, values in heat.items()}
    assert {OURS, f"{OURS}, Adam", f"{OURS}, FTRL", "FBGEMM TBE", "nn.EmbeddingBag(sparse), torch Adagrad"} <= set(times)
    assert all(len(values) == 8 and min(values) > 0 for values in times.values()), times
    assert {"route", "lookup", "update"} <= {phase["name"] for phase in result["phases"]}
    assert all(phase["limit_ms"] > 0 for phase in result["phases"] if phase["name"] in ("lookup", "combine", "update"))
    page = tmp_path / "page.md"
    text = report.write(step, [result], ["bench", "step"], Options(), page)
    assert page.read_text() == text
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")
    assert "2 tables, rows 100, columns 8, samples a rank 4" in text.lower()


class Crews:
    """In place of processes: notes who is started and ended, and answers every call with one step's time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
        self.broken, self.events = broken, []
        monkeypatch.setattr(roster.Roster, "_start", lambda _, entry: self._start(entry.name))
        monkeypatch.setattr(roster, "budget", lambda: 4 * 50 * 8 * 2.5)

    def _start(self, name: str) -> Any:
        if name == self.broken:
            raise CrewError("RuntimeError: no such kernel", "a long story")
        self.events.append(f"start {name}")
        return SimpleNamespace(do=self._do, close=lambda: self.events.append(f"close {name}"))

    def _do(self, action: Any, *given: int) -> list[Any]:
        return [{"phases": [], "limits": {}, "packings": {}}] if action is split.measured else [[1.0] * given[2]]


def test_a_contender_that_fails_is_left_out_and_ours_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    Crews(monkeypatch, "FBGEMM TBE")
    options = Options(rounds=1, steps=1, only="FBGEMM")
    assert step.one(TINY, ONE_RANK, 1, options)["left_out"] == {"FBGEMM TBE": "RuntimeError: no such kernel"}
    Crews(monkeypatch, OURS)
    with pytest.raises(CrewError, match="no such kernel"):
        step.one(TINY, ONE_RANK, 1, options)


def test_ours_stays_while_the_others_come_in_heats(monkeypatch: pytest.MonkeyPatch) -> None:
    crews = Crews(monkeypatch, "")
    result = step.one(TINY, ONE_RANK, 1, Options(rounds=1, steps=3))
    plain = "nn.EmbeddingBag(sparse), torch Adagrad"
    assert [{name: len(times) for name, times in heat.items()} for heat in result["heats"]] == [
        {OURS: 12, "FBGEMM TBE": 12},
        {OURS: 12, plain: 12},
    ]
    both = [event for name in ("FBGEMM TBE", plain) for event in (f"start {name}", f"close {name}")]
    assert crews.events == [f"start {OURS}", *both, f"close {OURS}"]


def test_the_fields_of_the_json_are_those_of_the_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    Crews(monkeypatch, "")
    text = (Path(__file__).parents[3] / "docs/benchmarks/README.md").read_text()
    paragraph = next(part for part in text.split("\n\n") if part.startswith("The JSON has"))
    assert set(re.findall("`([a-z_]+)`", paragraph)) - {"null"} == set(step.one(TINY, ONE_RANK, 1, Options(rounds=1)))


def test_the_page_has_ours_beside_every_peer_that_makes_the_same_step() -> None:
    times = {
        OURS: [1.0, 2.0],
        f'{OURS}, packing="bag"': [0.5, 1.0],
        "TorchRec": [4.0, 4.0],
        "TorchRec, bfloat16 wire": [1.0, 1.0],
        "DTensor": [9.0, None],
    }
    result = {
        "workload": "w",
        "size": {"tables": 1},
        "ranks": 2,
        "kind": "row_wise",
        "heats": [times],
        "left_out": {"FBGEMM TBE": "why"},
    }
    text = "\n".join(step.page([result], None))
    summary, rest = text.split("Below, for each")
    assert "| w | 2 | row-wise | 1.50 | TorchRec | 4.00 | **3.00** (2.50 to 3.50) | 4.00 |" in summary
    assert "| w | 2 | row-wise | 1.50 | DTensor | 9.00 | **9.00** (9.00 to 9.00) | 9.00 |" in summary
    assert "bfloat16" not in summary
    assert '| shardembed, packing="bag" | 0.75 | 0.62 to 0.88 | 0.50 | 0.50 (0.50 to 0.50) | 0.50 |' in rest
    assert "- Left out: FBGEMM TBE: why" in rest


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


def test_the_page_of_dynamic_tables_has_every_contender_beside_the_dense_one() -> None:
    def timed(ms: float, **stages: float) -> list[dynamic_step.Timed]:
        return [dynamic_step.Timed(2 * ms, ms, {name.replace("_", " "): taken for name, taken in stages.items()})]

    times = {
        dynamic.DENSE: timed(8.0),
        "dynamic, LRU": timed(10.0, find_ids=1.0, accumulate=0.5, commit_ids=2.0),
        "TorchRec ZCH, LRU, each step": [None, timed(80.0)[0]],
    }
    times = {name: (found * 2)[:2] for name, found in times.items()}
    memory = {dynamic.DENSE: [0, 0, 0], "dynamic, LRU": [1000, 26_000, 7]}
    result = {"ranks": 1, "times": dict.fromkeys(dynamic.MODES, times), "memory": memory, "left_out": {"TorchRec ZCH": "why"}}
    text = "\n".join(dynamic.page([result], None))
    line = "| dynamic, LRU | 20.00 | 10.00 (10.00 to 10.00) | 1.25 | **1.25 (1.25 to 1.25)** | 1.25 | 1.00 | 0.50 | 2.00 | 15% |"
    assert text.count(line) == len(dynamic.MODES)
    assert "**10.00 (10.00 to 10.00)**" in text
    assert "| dynamic, LRU | 1,000 | 26.0 | 7 |" in text
    assert "- Left out: TorchRec ZCH: why" in text


def test_newcomers_are_ids_that_never_came_and_the_same_for_all() -> None:
    task = tasks.alike("t", 1, 50, 8, 4, 30)
    ids = dynamic_step.ids_of(task.batches(0, 2), task, dynamic_step.as_ids)
    everyone = set(torch.cat(list(ids.everyone(0.0))).tolist())
    warm, fresh, again = ids.warm(1), ids.with_newcomers(1), ids.with_newcomers(1)
    assert set(warm.tolist()) <= everyone
    assert len(everyone) == 50
    assert torch.equal(fresh, again)
    new = set(fresh.tolist()) - everyone
    assert new
    assert not new & set(ids.with_newcomers(2).tolist())


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
