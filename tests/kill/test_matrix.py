"""Ranks are killed at every stage of training, saving and loading; the run goes on from the newest complete checkpoint and ends
with the same bits as one that was never killed.

`make test` tries a sample of the points, `make test-kill` all of them. A table of what was tried is printed at the end.
"""

from __future__ import annotations

import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import shardembed as se
from shardembed.checkpoint.format.verify import verify
from tests.kill.nursery import Ended, run_forked, values
from tests.kill.points import CASES, Case
from tests.kill.table import add_row
from tests.kill.trainer import BATCHES, KEEP, Finished, Mode, Run, state_of_all, train
from tests.kill.trap import Point

STEPS = re.compile(r"\.lock|step-\d{10}(-r\d+)?(\.\d+)?")
CHANGING = r"(collective checkpoint: .*|(mkdir|rename|unlink|rmdir|pwrite|fsync) .*)"  # events that must have a kill point each


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run ends with that nobody kills, by (ranks, exact); made when it is first asked for."""
    known: dict[tuple[int, bool], dict[str, Any]] = {}

    def reference(ranks: int, exact: bool) -> dict[str, Any]:
        if (ranks, exact) not in known:
            run = Run(tmp_path_factory.mktemp("reference"), exact=exact)
            known[ranks, exact] = state_of_all(values(run_forked(ranks, train, run, None)), random=not exact)
        return known[ranks, exact]

    return reference


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=case.name, marks=[] if case.sample else pytest.mark.matrix) for case in CASES]
)
def test_a_killed_run_ends_with_the_same_bits(case: Case, tmp_path: Path, never_killed: Any) -> None:
    run = Run(tmp_path, case.mode, case.exact)
    if case.begins:
        before = replace(run, batches=case.begins, keep=KEEP if case.back is None else BATCHES)
        values(run_forked(case.ranks, train, before, None))
    kill(case.ranks, replace(run, back=case.back), case.point)
    complete_ones_are_sound(tmp_path)
    if case.then is not None:
        kill(case.ranks, run, case.then)
        complete_ones_are_sound(tmp_path)
    ended: list[Finished] = values(run_forked(case.ends_on, train, run, None))
    assert ended[0].resumed in case.resumes, f"resumed from {ended[0].resumed}"
    assert all(one.trained == list(range(ended[0].resumed, BATCHES)) for one in ended), "a batch was skipped or trained twice"
    assert_same(state_of_all(ended, random=not case.exact), never_killed(1 if case.exact else case.ends_on, case.exact))
    left = sorted(path.name for path in tmp_path.iterdir())
    if ended[0].resumed < BATCHES:  # it has saved
        assert all(STEPS.fullmatch(name) for name in left), f"leftovers: {left}"
        assert len(left) <= 1 + KEEP + (case.mode == "incremental"), left
    complete_ones_are_sound(tmp_path)
    add_row(case, ended[0].resumed)


def kill(ranks: int, run: Run, point: Point) -> None:
    """Run until the point; the ranks that are not killed must end by themselves, with an error."""
    ended: list[Ended] = run_forked(ranks, train, run, point)
    for rank, end in enumerate(ended):
        if point.everybody or rank == point.rank:
            assert end.killed, f"rank {rank} did not come to the point: {end}"
        else:
            assert not end.by_test, f"rank {rank} was still running"
            assert end.code == 1, end
            assert isinstance(end.error, RuntimeError), end
            if isinstance(end.error, se.errors.CollectiveError):
                names = "rank 0, which hosts it" if point.rank == 0 else rf"Missing: rank\(s\) \[.*{point.rank}.*\]"
                assert re.search(names, str(end.error)), end.error


def complete_ones_are_sound(folder: Path) -> None:
    """Whatever has the name of a complete checkpoint is one, and nothing in it is damaged."""
    for step, path in se.checkpoints(folder):
        assert not verify(path), f"step {step} has the name of a complete checkpoint, but is damaged"


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if found[name] != wanted[name]]
    assert not different, f"not the same bits: {different}"


@pytest.mark.parametrize("ranks", [2, 3])
def test_runs_on_any_number_of_ranks_are_the_same(ranks: int, never_killed: Any) -> None:
    """Without this, ending on another number of ranks would show nothing."""
    assert_same(never_killed(ranks, True), never_killed(1, True))


@pytest.mark.parametrize("mode", ["full", "incremental"])
def test_everything_a_save_does_has_a_kill_point(mode: Mode, tmp_path: Path) -> None:
    ended: list[Finished] = values(run_forked(2, train, Run(tmp_path, mode), None))
    events = {name for one in ended for _, save, name in one.events if save == 6 and re.fullmatch(CHANGING, name)}
    events.discard("mkdir folder")  # it is there
    patterns = {case.point.event for case in CASES if case.point.save}
    missed = {name for name in events if not any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert len(events) > 15, events
    assert not missed, f"no rank is killed at {sorted(missed)}"


def test_all_of_it_is_on_the_disk_before_it_gets_its_name(tmp_path: Path) -> None:
    """A killed process loses nothing that it wrote, a machine without power does: only the order of calls can show it."""
    ended: list[Finished] = values(run_forked(2, train, Run(tmp_path), None))
    first, other = [[name for _, save, name in one.events if save == 6] for one in ended]
    written = {name.removeprefix("pwrite ") for name in first if name.startswith("pwrite ")}
    assert written == {"rank-00000.safetensors", "state.json", "manifest.json"}
    named = first.index("rename .saving")
    for name in written:
        assert last(first, f"pwrite {name}") < first.index(f"fsync {name}") < first.index("fsync .saving") < named, first
    files, manifest = first.index("fsync rank-00000.safetensors"), first.index("open manifest.json")
    assert files < first.index("collective checkpoint: write") < manifest, first
    assert last(first, "fsync folder") > named, first
    assert named < first.index("collective checkpoint: publish") < first.index("rename step"), first
    assert last(other, "pwrite rank-00001.safetensors") < other.index("fsync rank-00001.safetensors"), other
    assert other.index("fsync rank-00001.safetensors") < other.index("collective checkpoint: write"), other


def last(events: list[str], name: str) -> int:
    return len(events) - 1 - events[::-1].index(name)


def test_the_matrix_is_as_large_as_promised() -> None:
    assert len(CASES) >= 40
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.ranks for case in CASES} == {2, 3}
    assert all(case.point.signal == signal.SIGKILL for case in CASES)
