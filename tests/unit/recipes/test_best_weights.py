"""The best weights of a run are kept, whatever ends it, and the job ends with them."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shardembed.checkpoint import checkpoints
from shardembed.embeddings.of_run import checkpoint_of
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import CheckpointError
from shardembed.recipes import best, train
from shardembed.recipes.config import Config

STEPS = 6  # two an epoch


@dataclass(frozen=True)
class Scored:
    """What an evaluation might find."""

    score: float

    def to_json(self) -> dict[str, Any]:
        return {"recall@20": self.score}

    def show(self, console: Console) -> None:
        pass


class Scripted:
    """Evaluations that find what the test wants, in the place of the real ones; keeps the user table at each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *scores: float) -> None:
        self._scores: Iterator[float] = iter(scores)
        self.tables: list[torch.Tensor] = []
        monkeypatch.setattr(train, "evaluate", self._evaluate)

    def _evaluate(self, task: Any, job: Any) -> Scored:
        self.tables.append(job.model.tables.rows("user", torch.arange(10)).clone())
        return Scored(next(self._scores))


def config(folder: Path, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "name": "test",
        "data": {"generator": {"users": 60, "items": 40, "interactions": 600}},
        "model": {"embedding_dim": 4, "negatives": 8},
        "train": {"epochs": 3, "global_batch_size": 32},
        "checkpoint": {"keep": 1},
        "log": {"page": False},
        "run_dir": str(folder),
    }
    return Config.model_validate({**values, **sections})


def trained(settings: Config) -> dict[str, Any]:
    return train.run(settings, Console(file=io.StringIO()))


def kept(run: Path) -> list[int]:
    return [step for step, _ in checkpoints(run / "best")]


def test_a_job_ends_with_its_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, 0.5, 0.7, 0.6, 0.65)  # the last one with the best weights
    done = train.work(config(tmp_path), Console(file=(said := io.StringIO())))
    run, summary = Path(done.summary["run_dir"]), done.summary
    assert (summary["steps"], summary["best_step"], summary["recall@20"]) == (STEPS, 4, 0.65)
    assert "with the best weights, those of step 4 of 6" in said.getvalue()
    assert torch.equal(script.tables[3], script.tables[1])
    assert not torch.equal(script.tables[2], script.tables[1])
    assert (kept(run), [step for step, _ in checkpoints(run / "checkpoints")]) == ([4], [6])
    with StoredTables(run) as stored:
        assert stored.path == run / "best" / "step-0000000004"
        assert torch.equal(stored.find("user").some(torch.arange(10)), script.tables[1])
    assert checkpoint_of(run, 6) == run / "checkpoints" / "step-0000000006"
    (run / "summary.json").unlink()  # as long as it is not finished, its newest counts
    assert checkpoint_of(run) == run / "checkpoints" / "step-0000000006"


@pytest.mark.parametrize(
    ("sections", "evaluated"),
    [({"eval": {"keep": "last"}}, 3), ({"checkpoint": {"every_steps": None}}, 3), ({"eval": {"every_steps": None}}, 1)],
)
def test_the_last_weights_stay_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any], evaluated: int
) -> None:
    script = Scripted(monkeypatch, 0.5, 0.7, 0.6)
    summary = trained(config(tmp_path, **sections))
    assert (summary["best_step"], len(script.tables)) == (STEPS, evaluated)
    assert kept(Path(summary["run_dir"])) == []


def test_weights_that_are_best_at_the_end_are_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted(monkeypatch, 0.5, float("nan"), 0.7)
    summary = trained(config(tmp_path))
    assert (summary["best_step"], summary["recall@20"], len(script.tables)) == (STEPS, 0.7, 3)
    run = Path(summary["run_dir"])
    files = [os.stat(path) for path in (run / "best").rglob("rank-*")]
    assert files
    assert all(one.st_nlink == 2 for one in files)  # they take no room of their own


class Crash(BaseException):
    """Ends the process, as far as the job can tell."""


def crashing(patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], after: bool = False) -> None:
    """The first call to a function for which `when` holds does not return."""
    made = getattr(owner, name)

    def crash(*args: Any, **kwargs: Any) -> Any:
        crashes = when(*args)
        found = made(*args, **kwargs) if after or not crashes else None
        if crashes:
            raise Crash
        return found

    patch.setattr(owner, name, crash)


def of_step_4(console: Console, run: Any, checkpoint: Path) -> bool:
    return checkpoint.name == "step-0000000004"


@pytest.mark.parametrize(
    ("owner", "name", "when", "after", "left"),
    [
        (best, "keep", of_step_4, False, [2]),  # saved, but not kept yet
        (best, "_linked", lambda source, target: "0004/rank-00000" in source, False, [2]),  # some of its files
        (best.folders, "sync_folder", lambda path: path.parent.name == "best" and "0002" not in str(path), False, []),
        (best.folders, "remove", lambda path: path.parent.name == "best", False, [2, 4]),  # beside the one before
        (best, "keep", of_step_4, True, [4]),
    ],
)
def test_a_crash_loses_neither_the_best_nor_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, when: Any, after: bool, left: list[int]
) -> None:
    settings = config(tmp_path)
    with monkeypatch.context() as patch:
        Scripted(patch, 0.5, 0.7)
        crashing(patch, owner, name, when, after)
        with pytest.raises(Crash):
            trained(settings)
    (run,) = tmp_path.iterdir()
    assert kept(run) == left
    Scripted(monkeypatch, *([0.6, 0.7] if left else [0.7, 0.6, 0.7]))
    summary = trained(settings)
    assert Path(summary["run_dir"]) == run
    assert (summary["best_step"], kept(run)) == (4, [4])
    assert not [path for path in (run / "best").iterdir() if path.name.startswith(".")]


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has kept step 2, and gone on to step 4."""
    with monkeypatch.context() as patch:
        crashing(patch, best, "scored", lambda progress, score, config: score == 0.4)
        Scripted(patch, 0.7, 0.5, 0.4)
        with pytest.raises(Crash):
            trained(config(tmp_path, checkpoint={"every_steps": 2, "keep": 3}))
    (run,) = tmp_path.iterdir()
    assert kept(run) == [2]
    return run


def test_what_is_measured_by_another_rule_is_no_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch)
    Scripted(monkeypatch, 0.4)
    summary = trained(config(tmp_path, checkpoint={"every_steps": 2, "keep": 3}, eval={"k": 5}))
    assert (summary["best_step"], summary["recall@20"]) == (STEPS, 0.4)


def test_the_best_is_what_the_checkpoint_tells_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = interrupted(tmp_path, monkeypatch)
    shutil.rmtree(run / "best")
    Scripted(monkeypatch, 0.4)
    summary = trained(config(tmp_path, checkpoint={"every_steps": 2, "keep": 3}))
    assert (summary["best_step"], kept(run)) == (STEPS, [STEPS])


def damage(checkpoint: Path) -> None:
    """Of all that have links to its files, as on a failing disk."""
    path = checkpoint / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)


def test_a_damaged_best_is_made_anew_by_a_run_that_goes_on_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path, checkpoint={"every_steps": 2, "keep": 3})
    with monkeypatch.context() as patch:
        crashing(patch, best, "scored", lambda progress, score, config: score == 0.4)
        Scripted(patch, 0.5, 0.7, 0.4)
        with pytest.raises(Crash):
            trained(settings)
    (run,) = tmp_path.iterdir()
    assert kept(run) == [4]
    damage(run / "checkpoints" / "step-0000000004")
    shutil.rmtree(run / "checkpoints" / "step-0000000004")  # as the message says
    script = Scripted(monkeypatch, 0.7, 0.4, 0.7)
    summary = trained(settings)
    assert (summary["best_step"], summary["recall@20"], kept(run)) == (4, 0.7, [4])
    assert torch.equal(script.tables[2], script.tables[0])


def test_a_best_that_is_damaged_when_the_run_ends_gives_way_to_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, made = Scripted(monkeypatch, 0.5, 0.7, 0.6, 0.65), best.load

    def load(console: Console, run: Any, *rest: Any) -> int:
        damage(run.path / "best" / "step-0000000004")
        return made(console, run, *rest)

    monkeypatch.setattr(best, "load", load)
    said = io.StringIO()
    summary = train.run(config(tmp_path), Console(file=said, width=600))
    assert "the best weights cannot be loaded, so the newest are used:" in said.getvalue()
    assert (summary["best_step"], kept(Path(summary["run_dir"]))) == (STEPS, [])
    assert torch.equal(script.tables[-1], script.tables[2])


def test_links_that_cannot_be_made_are_copies_and_what_cannot_be_kept_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    Scripted(monkeypatch, 0.5, 0.7, 0.6, 0.7)
    summary = trained(config(tmp_path / "copied"))
    assert (summary["best_step"], kept(Path(summary["run_dir"]))) == (4, [4])
    with monkeypatch.context() as patch:
        patch.setattr(best.shutil, "copytree", refused)
        Scripted(patch, 0.5, 0.7, 0.6)
        said = io.StringIO()
        summary = train.run(config(tmp_path / "full"), Console(file=said, width=400))
    assert summary["best_step"] == STEPS
    assert "the best weights so far cannot be kept in" in said.getvalue()
    assert json.loads((Path(summary["run_dir"]) / "summary.json").read_text())["best_step"] == STEPS


def test_a_step_that_is_nowhere_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, 0.5, 0.7, 0.6, 0.7)
    run = Path(trained(config(tmp_path))["run_dir"])
    with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
        checkpoint_of(run, 3)
