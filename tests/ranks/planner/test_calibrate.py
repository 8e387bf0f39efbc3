"""`shardembed calibrate` on real ranks: what it measures, the file it writes, and its refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardembed as se
from shardembed.cli import failures, main
from shardembed.journey import journey
from shardembed.planner import calibrate
from shardembed.planner.calibrate import drawn, stages
from shardembed.planner.cost_phases import COPIES, PHASES, UPDATE
from shardembed.planner.topology import load, to_yaml
from shardembed.tables.placement import Cluster
from tests.harness import run_ranks


def calibrate_in_rank(rank: int, world_size: int) -> str:
    return to_yaml(calibrate.calibrate("here", seconds=0.1, cases=4))


def test_all_ranks_get_one_topology_that_a_file_holds(tmp_path: Path) -> None:
    first, second = run_ranks(2, calibrate_in_rank)
    assert first == second
    path = tmp_path / "topology.yaml"
    path.write_text(first)
    found = load(path)
    assert (found.ranks, found.ranks_per_node) == (2, 2)
    assert 0 < found.memory - found.reserve < found.memory
    assert found.intra == found.inter
    assert found.intra.bandwidth > 0
    numbers = [number for op in found.ops.values() for number in (op.call, op.row, op.byte)]
    assert min(numbers) >= 0
    assert sum(numbers) > 0
    assert "4 cases on 2 rank(s)" in found.source["measured"]


def time_in_rank(rank: int, world_size: int) -> dict[str, Any]:
    before = [getattr(journey, name) for name in stages.WATCHED]
    cases = drawn.cases(Cluster(2, 2), 4, seed=1, elements=1 << 14)
    copied = [any(table.layout.copied for table in case.plan.tables) for case in cases]
    ends = [stages.Runner(case, batches=2, seed=0).measure(rounds=3, warm=1) for case in cases]
    phases = [stages.phases_of(stages.gathered(part)) for part in ends]
    last = [max(float(other[-1, -1]) for other in stages.gathered(part)) for part in ends]
    untouched = before == [getattr(journey, name) for name in stages.WATCHED]
    return {"phases": phases, "last": last, "copied": copied, "untouched": untouched}


def test_the_phases_of_a_step_add_up_to_it() -> None:
    first, second = run_ranks(2, time_in_rank)
    for phases, other, last, copied in zip(first["phases"], second["phases"], first["last"], first["copied"], strict=True):
        assert phases.shape == (3, len(PHASES))
        np.testing.assert_array_equal(phases, other)
        assert (phases >= 0).all()
        assert phases.sum() == pytest.approx(last)
        assert (phases[:, UPDATE] > 0).all()
        assert (phases[:, COPIES] > 0).all() or not copied
    assert first["untouched"], "the stages of the library stay wrapped"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", failures.ERROR_FILE):
        monkeypatch.delenv(name, raising=False)


def test_one_rank_alone_writes_a_file_and_says_that_it_saw_no_link(
    alone: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "CASES", 4)
    out = tmp_path / "here.yaml"
    assert main(["calibrate", "--ranks", "1", "--seconds", "0.1", "--name", "laptop", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["name"], said["ranks"], said["out"]) == ("laptop", 1, str(out))
    found = load(out)
    assert found.name == "laptop"
    assert "not measured" in found.source["links"]
    assert found.intra.bandwidth > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ranks", "0"], "the number of ranks must be at least 1"),
        (["--seconds", "0"], "timing takes more than no time"),
        (["--out", "nowhere/at/all.yaml"], "there is no folder"),
    ],
)
def test_wrong_arguments_are_refused_before_a_minute_is_spent(
    alone: None, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *words]) == 2
    assert message in capsys.readouterr().err


def test_ranks_of_a_job_are_as_many_as_the_job_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["calibrate", "--ranks", "3", "--out", str(tmp_path / "out.yaml")]) == 2
    assert "a job of 2 ranks" in capsys.readouterr().err
    assert se.Comm.of().world_size == 1
