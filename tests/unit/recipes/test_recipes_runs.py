"""Which folder a job works in, and what it leaves there whatever happens."""

from __future__ import annotations

import calendar
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

from shardembed.cli import failures, main
from shardembed.errors import CheckpointError
from shardembed.recipes import saving, scalars, train
from shardembed.recipes.build import Job
from shardembed.recipes.data import kept
from shardembed.recipes.data.interactions import Pairs
from shardembed.recipes.models.two_tower import Batch
from shardembed.recipes.run_folder import RunFolder

JOB = """
data: {path: DATA, user: user, item: item}
model: {embedding_dim: 8, negatives: 16}
train: {epochs: 3, global_batch_size: 20}
checkpoint: {every_steps: 2}
eval: {every_steps: null}
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", failures.ERROR_FILE, failures.QUIET):
        monkeypatch.delenv(name, raising=False)
    write_data(tmp_path / "taken.csv", 7)
    path = tmp_path / "tiny.yaml"
    path.write_text(JOB.replace("DATA", str(tmp_path / "taken.csv")) + f"run_dir: {tmp_path / 'runs'}\n")
    return path


def write_data(path: Path, items: int) -> None:
    path.write_text("user,item\n" + "".join(f"{row % 20},{row % items}\n" for row in range(100)))


class Crash(BaseException):
    """Nothing of the command line's catches it."""


def interrupted(job: Path, *words: str, step: int = 5) -> Path:
    """Run the job until `step`, where it ends; returns its folder."""
    before = set(runs_of(job))
    with mock.patch.object(Job, "_batch", crash_at(step)), pytest.raises(Crash):
        main(["train", str(job), *words])
    made = set(runs_of(job)) - before
    return made.pop() if made else runs_of(job)[-1]


def crash_at(step: int) -> Callable[[Job, Pairs, int], Batch]:
    made = Job._batch

    def batch(self: Job, part: Pairs, number: int) -> Batch:
        if number == step:
            raise Crash
        return made(self, part, number)

    return batch


def runs_of(job: Path) -> list[Path]:
    root = job.parent / "runs"
    return sorted(root.iterdir()) if root.exists() else []


def finished(job: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[Path, str]:
    """Run the job to its end: its folder, and what was said."""
    capsys.readouterr()
    assert main(["train", str(job), "--json", *words]) == 0
    printed = capsys.readouterr()
    return Path(json.loads(printed.out)["run_dir"]), printed.err


def test_the_same_command_resumes_and_the_next_one_begins_anew(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(job)
    assert not (folder / "summary.json").exists()
    again, said = finished(job, capsys)
    assert again == folder
    assert f"resuming {folder} at step 4 of 12 (saved on 1 rank, now 1)" in said
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12
    assert sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name[0] != ".") == [
        "step-0000000010",
        "step-0000000012",
    ]
    other, said = finished(job, capsys)
    assert other != folder
    assert "resuming" not in said


def test_what_does_not_change_the_numbers_may_change(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(job)
    words = ["--set", "plan.user=column_wise", "--set", "eval.k=3", "--set", "checkpoint.every_steps=3"]
    again, _ = finished(job, capsys, *words)
    assert again == folder
    assert "column_wise" in (folder / "config.yaml").read_text()  # as it was run at last


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("optimizer.tables.lr=0.2", "optimizer.tables.lr was 0.1 there and is 0.2 here"),
        ("wire_dtype=bfloat16", 'wire_dtype was null there and is "bfloat16" here'),
        ("model.towers=[4]", "model.towers was [] there and is [4] here"),
        ("train.max_steps=6", "train.max_steps was null there and is 6 here"),
    ],
)
def test_other_settings_begin_a_new_run_and_are_named(
    job: Path, option: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = interrupted(job)
    other, said = finished(job, capsys, "--set", option)
    assert other != folder
    assert f"{folder} is unfinished, but {told}: starting a new run" in said
    again, _ = finished(job, capsys)  # it can still be resumed
    assert again == folder


def test_the_newest_run_that_fits_is_resumed(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(job)
    second = interrupted(job, "--fresh")
    interrupted(job, "--set", "train.seed=1")
    again, said = finished(job, capsys)
    assert again == second
    assert "starting a new run" not in said


def test_a_run_that_was_resumed_keeps_its_place_among_others(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(job)
    second = interrupted(job, "--fresh")
    known = (second / "data.json").read_text()
    assert json.loads(known)["number"] == 2
    interrupted(job, step=9)  # goes on with it
    assert (second / "data.json").read_text() == known
    again, _ = finished(job, capsys)
    assert again == second


def test_the_newest_run_is_the_one_begun_last_whatever_the_clock_says(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        for zone in ("Etc/GMT-14", "Etc/GMT+12"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            newest = interrupted(job, "--fresh")
        stamps = [path.name[: len("tiny-yyyymmdd-hhmmss")] for path in runs_of(job)]  # a second one in a second has a number
        begun = [calendar.timegm(time.strptime(stamp, "tiny-%Y%m%d-%H%M%S")) for stamp in stamps]
        assert all(abs(time.time() - one) < 6 * 3600 for one in begun)  # UTC, from which both zones are further away
        os.rename(newest, newest.with_name("tiny-19990101-000000"))  # as if the clock had been set back
        again, _ = finished(job, capsys)
        assert again.name == "tiny-19990101-000000"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("trap", ["pipe", "[" * 200_000, '{"number": %s}' % ("9" * 19), '{"number": true}', '{"number": -5}'])
def test_the_number_of_a_run_that_came_from_elsewhere_is_believed_nothing(
    job: Path, capsys: pytest.CaptureFixture[str], trap: str
) -> None:
    stranger = job.parent / "runs" / "tiny-20990101-000000"
    stranger.mkdir(parents=True)
    if trap == "pipe":
        os.mkfifo(stranger / "data.json")
    else:
        (stranger / "data.json").write_text(trap)
    mine, _ = finished(job, capsys)
    assert json.loads((mine / "data.json").read_text())["number"] == 1


def test_settings_of_a_run_that_are_a_pipe_or_a_link_are_not_waited_for(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for trap in (os.mkfifo, lambda path: os.symlink(job, path)):
        stranger = interrupted(job, "--fresh")
        (stranger / "config.yaml").unlink()
        trap(stranger / "config.yaml")
        mine, said = finished(job, capsys)
        assert mine != stranger
        assert "its settings cannot be read" in said


def test_runs_of_older_versions_go_by_their_names_and_are_older_than_all_others(
    job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = [interrupted(job, "--fresh") for _ in range(3)]
    named = [made[0].with_name(f"tiny-{stamp}") for stamp in ("20990101-000000-10", "20990101-000000-9", "20200101-000000")]
    for path, name in zip(made, named, strict=True):
        os.rename(path, name)
    for path in named[:2]:
        (path / "data.json").write_text(json.dumps({"counted": json.loads((path / "data.json").read_text())["counted"]}))
    for expected in (named[2], named[0], named[1]):
        again, _ = finished(job, capsys)
        assert again == expected


def test_fresh_and_runs_without_a_checkpoint_begin_anew(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    early = interrupted(job, step=1)
    late = interrupted(job)
    assert early != late
    fresh, said = finished(job, capsys, "--fresh")
    assert fresh not in (early, late)
    assert "resuming" not in said


def test_fresh_goes_on_with_a_run_of_the_same_job(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a launcher starts again has the words of the first time."""
    interrupted(job)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    mine = interrupted(job, "--fresh")
    again, _ = finished(job, capsys, "--fresh")
    assert again == mine


def test_a_folder_that_somebody_works_in_is_left_alone(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(job)
    held = RunFolder.lock(folder, "theirs")
    assert held is not None
    other, said = finished(job, capsys)
    assert other != folder
    assert f"{folder} is unfinished, but another process is working on it" in said
    assert (folder / "lock").read_text() == "theirs"
    held.close()
    again, _ = finished(job, capsys)
    assert again == folder


def test_a_run_on_other_data_is_not_resumed(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(job)
    write_data(job.parent / "taken.csv", 6)
    capsys.readouterr()
    assert main(["train", str(job)]) == 2
    said = capsys.readouterr().err
    assert (
        f"{folder} cannot be resumed, because the data have changed since. Then: 100 interactions of 20 users and 7 items" in said
    )
    assert "Now: 100 interactions of 20 users and 6 items" in said
    assert len(runs_of(job)) == 1
    write_data(job.parent / "taken.csv", 7)
    lines = (job.parent / "taken.csv").read_text().splitlines()
    swapped = [*lines[:3], lines[4], lines[3], *lines[5:]]
    (job.parent / "taken.csv").write_text("\n".join(swapped))
    assert main(["train", str(job)]) == 2
    said = capsys.readouterr().err
    assert "cannot be resumed, because the data have changed since" in said
    (job.parent / "taken.csv").write_text("\r\n".join(lines))  # the same rows
    assert finished(job, capsys)[0] == folder


@pytest.mark.parametrize("users", [20, 19])
def test_a_run_of_a_version_that_noted_no_order_goes_on_where_the_numbers_are_the_same(
    job: Path, users: int, capsys: pytest.CaptureFixture[str]
) -> None:
    job.write_text(job.read_text().replace("item: item", "item: item, ids: numbered"))  # such as all were then
    folder = interrupted(job)
    old = f"100 interactions of {users} users and 7 items, held-out rows 1234, counts 0123abcd"
    now = json.loads((folder / "data.json").read_text())["counted"]
    (folder / "data.json").write_text(json.dumps({"counted": old}))
    capsys.readouterr()
    code = main(["train", str(job)])
    said = "".join(capsys.readouterr())
    if users == 20:
        assert code == 0
        assert f"{folder} was begun by a version that noted no order of rows: only their number could be compared" in said
        assert json.loads((folder / "data.json").read_text())["counted"] == now
    else:
        assert code == 2
        assert f"Then: {old}. Now: {now}" in said


def test_data_that_change_while_they_are_trained_on_end_the_run_which_can_be_resumed(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are too many to be kept. And no process but ours has to read them again to notice."""
    monkeypatch.setattr(kept, "KEPT_BYTES", 0)
    data = job.parent / "taken.csv"
    made, whole = Job._batch, data.read_bytes()

    def batch(self: Job, part: Pairs, number: int) -> Batch:
        if number == 2:
            data.write_bytes(whole[: len(whole) // 2])
        return made(self, part, number)

    with mock.patch.object(Job, "_batch", batch):
        assert main(["train", str(job)]) == 2
    (folder,) = runs_of(job)
    said = capsys.readouterr().err
    assert f"{data}: there are only " in said
    assert not (folder / "summary.json").exists()
    data.write_bytes(whole)
    again, said = finished(job, capsys)
    assert again == folder
    assert "at step 4 of 12" in said


def test_no_checkpoints_where_none_are_asked_for(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    interrupted(job)
    folder, said = finished(job, capsys, "--set", "checkpoint.every_steps=null")
    assert "resuming" not in said
    assert not (folder / "checkpoints").exists()
    assert "every_steps: null" in (folder / "config.yaml").read_text()


def test_a_save_that_fails_is_told_and_training_goes_on(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(saving.se, "save_checkpoint", side_effect=CheckpointError("the disk is full")):
        folder, said = finished(job, capsys)
    assert said.count("no checkpoint was saved: the disk is full") == 6
    assert json.loads((folder / "summary.json").read_text())["steps"] == 12


@contextmanager
def small_files(most: int) -> Iterator[None]:
    """Files of this process may not grow beyond `most` bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_no_training_and_what_was_not_written_comes_later(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(job)
    kept = {name: (folder / name).read_bytes() for name in ("config.yaml", "plan.json", "data.json")}
    capsys.readouterr()
    with small_files(100):  # the lock has less
        assert main(["train", str(job), "--set", "eval.k=3"]) == 2  # not to be tried again by a launcher
    printed = capsys.readouterr()
    for name in ("config.yaml", "plan.json", "metrics.jsonl", "observed.json"):
        assert printed.out.count(f"{folder / name} cannot be written: File too large; training goes on, and tries it again") == 1
    assert "at step 4 of 12" in printed.out
    assert printed.out.count("no checkpoint was saved") == 4
    assert "recall@3" in printed.out  # all that training was for
    assert f"run_dir: {folder / 'summary.json'} cannot be written: File too large" in printed.err
    assert "Traceback" not in printed.err
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    assert not list(folder.glob(".*.new"))
    again, said = finished(job, capsys)
    assert again == folder
    assert "at step 4 of 12" in said
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


def test_a_run_that_cannot_be_begun_on_a_full_disk_says_so(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_files(70):
        assert main(["train", str(job)]) == 2
    assert "run_dir: cannot write" in (said := capsys.readouterr().err)
    assert "data.json: File too large; set run_dir to another folder" in said
    with small_files(10):
        assert main(["train", str(job)]) == 2
    assert "run_dir: cannot lock" in capsys.readouterr().err


def test_lines_that_could_not_be_written_are_written_once_when_there_is_room(tmp_path: Path) -> None:
    told: list[str] = []
    with RunFolder.make(tmp_path, "x", "t") as folder:
        folder.note = told.append
        folder.log([{"step": 1}])
        with small_files(20):
            folder.attempt("config.yaml", lambda: folder.write("config.yaml", "a" * 30))
            folder.log([{"step": 2}])
            folder.log([{"step": 3}], lasting=True)
            assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n'  # no half of a line
        folder.log([{"step": 4}])
        assert (folder.path / "metrics.jsonl").read_text() == "".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4))
        assert (folder.path / "config.yaml").read_text() == "a" * 30 + "\n"
    assert [text.removeprefix(f"{folder.path}/").partition(": ")[0] for text in told] == [
        "config.yaml cannot be written",
        "metrics.jsonl cannot be written",
        "config.yaml has been written after all",
        "metrics.jsonl has been written after all",
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("most", [0, 200])
def test_curves_that_cannot_be_written_end_and_training_does_not(tmp_path: Path, most: int) -> None:
    pytest.importorskip("tensorboard")
    told: list[str] = []
    with small_files(most), scalars.Scalars(tmp_path, 0, told.append, {"train.epochs": 3}) as curves:
        for step in range(1, 60):
            curves.add([(step, "train/loss", 0.5)])
        curves.finish(60, {"auc": 0.5})
    assert len(told) == 1
    assert told[0].startswith("tensorboard: no more scalars are written for TensorBoard: ")


def test_a_damaged_checkpoint_says_what_can_be_done(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = interrupted(job)
    (damaged,) = (folder / "checkpoints" / "step-0000000004").glob("*.safetensors")
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    capsys.readouterr()
    assert main(["train", str(job)]) == 1
    said = capsys.readouterr().err
    assert str(damaged) in said
    assert "remove that one to go on from the one before, or begin a new run with --fresh" in said
    os.rename(damaged.parent, job.parent / "away")
    again, said = finished(job, capsys)
    assert again == folder
    assert "at step 2 of 12" in said


def test_metrics_of_lost_steps_and_cut_off_lines_are_removed(tmp_path: Path) -> None:
    with RunFolder.make(tmp_path, "x", "t") as folder:
        folder.keep_metrics(3)
        assert not (folder.path / "metrics.jsonl").exists()
        folder.log([{"step": step} for step in (1, 2, 3, 4)])
        with open(folder.path / "metrics.jsonl", "a") as file:
            file.write('{"steps": 4}\n[]\n{"step": 3, "lo')
        folder.keep_metrics(3)
        assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
        assert RunFolder.lock(folder.path, "u") is None
    again = RunFolder.lock(folder.path, "u")
    assert again is not None
    again.close()


def test_an_evaluation_that_fails_leaves_the_run_unfinished(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(train, "evaluate", side_effect=Crash), pytest.raises(Crash):
        main(["train", str(job)])
    (folder,) = runs_of(job)
    again, said = finished(job, capsys, "--set", "eval.k=3")
    assert again == folder
    assert "at step 12 of 12" in said
    assert "recall@3" in json.loads((folder / "summary.json").read_text())


def test_restarts_are_checked(job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", str(job), "--max-restarts", "-1"]) == 2
    assert "the number of restarts must be at least 0" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", str(job), "--max-restarts", "1"]) == 2
    assert "give --max-restarts to what started it (torchrun)" in capsys.readouterr().err
