"""`shardembed train` as a user calls it: processes of its own, two ranks, torchrun, Ctrl-C, and what is said when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from shardembed.recipes import config
from shardembed.tables.plan import Plan
from tests.jobs import wait_until

ROOT = Path(__file__).parents[3]
TRAIN = ("-m", "shardembed", "train")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SECONDS = 300  # a command that has not ended by then hangs, however loaded the machine is
STEPS = 30
UNSAVED = ("--set", "checkpoint.every_steps=null")  # nothing to say of a checkpoint, however late the end comes
WORKERS = ("--set", "data.workers=1")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration and a TSV file beside it: 40 users take every second item, those of their own parity."""
    folder = tmp_path_factory.mktemp("job")
    pairs = [(user, 2 * ((7 * user + 3 * turn) % 25) + user % 2) for turn in range(15) for user in range(40)]
    lines = ["user\twhen\titem", *(f"{user}\tx\t{item}" for user, item in pairs)]
    (folder / "taken.tsv").write_text("\n".join(lines) + "\n")
    path = folder / "job.yaml"
    path.write_text(
        f"data: {{path: {folder / 'taken.tsv'}, user: user, item: item}}\n"
        "model: {embedding_dim: 8, negatives: 16}\n"
        "train: {epochs: 1000000, global_batch_size: 40}\n"
        "plan: {item: {kind: row_wise, strided: true}}\n"
        f"run_dir: {folder / 'runs'}\n"
    )
    return path


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Commands that a test starts; what is left of them afterwards is ended, with all its ranks."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        for pid in [process.pid, *children(process.pid)]:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def start(*words: object) -> subprocess.Popen[str]:
    """Run python with `words`, as the head of a process group of its own, as a shell does."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "80"}
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_USE_AGENT_STORE",
        "TORCHELASTIC_RUN_ID",
    ):
        environment.pop(name, None)
    command = [sys.executable, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True, cwd=ROOT)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def rank_processes(launcher: int) -> dict[int, int]:
    """The launcher's ranks: process ids by rank."""
    found = {}
    for pid in children(launcher):
        for setting in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if setting.startswith(b"RANK="):
                found[int(setting[len(b"RANK=") :])] = pid
    return found


def workers_of(rank: int) -> list[int]:
    """The processes that read the data of a rank."""
    return [pid for pid in children(rank) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def has_checkpoint(runs: Path) -> bool:
    return any(runs.glob("*/checkpoints/step-*/manifest.json"))


def gone(pid: int) -> bool:
    """The process has ended, whether or not somebody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def read_until(process: subprocess.Popen[str], start: str) -> list[str]:
    """Lines of stdout up to the first that begins with `start`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError(f"no line begins with {start!r}: {''.join(lines)}")


@pytest.mark.exhaustive
def test_two_ranks_train_on_a_file_and_a_torchrun_job_does_the_same(job: Path) -> None:
    words = (*TRAIN, job, "--json", "--max-steps", STEPS)
    # Of the two jobs the second is joined, not started: `--ranks` is not given. Its ranks have their data read by workers.
    processes = [start(*words, "--ranks", 2), start(*TORCHRUN, *words, *WORKERS)]
    summaries = []
    for process in processes:
        code, out, err = finish(process)
        assert code == 0, err
        assert len(out.splitlines()) == 1
        assert err.count("held by each rank") == 1  # rank 0 alone reports
        summaries.append(json.loads(out))
    first, second = summaries
    assert (first["ranks"], first["steps"], first["evaluated_users"], len(first["losses"])) == (2, STEPS, 40, 20)
    assert sum(first["losses"][-5:]) < sum(first["losses"][:5])
    assert 0 <= first["popularity_recall@20"] <= 1
    assert first["recall@20"] > first["popularity_recall@20"]
    assert first["samples_per_second"] > 0
    assert second["losses"] == first["losses"]
    assert second["recall@20"] == first["recall@20"]
    assert second["run_dir"] != first["run_dir"]
    folder = Path(first["run_dir"])
    files = ["best", "checkpoints", "config.yaml", "data.json", "lock", "metrics.jsonl", "names", "observed.json", "plan.json"]
    assert sorted(path.name for path in folder.iterdir()) == [*files, "run.html", "summary.json"]
    assert json.loads((folder / "summary.json").read_text()) == first
    assert config.load(folder / "config.yaml").train.max_steps == STEPS
    assert Plan.load(folder / "plan.json").world_size == 2
    _, *records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if not {"evaluation", "ids"}.intersection(record)]
    assert [record["loss"] for record in records[:20]] == first["losses"]
    assert len(records) == STEPS + 1
    assert records[-1]["recall@20"] == first["recall@20"]


@pytest.mark.exhaustive
def test_ctrl_c_ends_all_ranks_and_prints_no_traceback(job: Path, started: list[subprocess.Popen[str]]) -> None:
    started += [start(*TRAIN, job, *UNSAVED, "--ranks", 2), start(*TRAIN, job, *UNSAVED, *WORKERS)]
    for process in started:
        read_until(process, "held by each rank")  # the last that is said before training
    wait_until(lambda: workers_of(started[1].pid))
    workers = workers_of(started[1].pid)  # which may still be starting
    ranks = rank_processes(started[0].pid)
    assert sorted(ranks) == [0, 1]
    for process in started:
        os.killpg(process.pid, signal.SIGINT)  # what a terminal sends
    for process in started:
        code, out, err = finish(process)
        assert code == 130
        assert err == ""
        assert "Traceback" not in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*ranks.values(), *workers))


@pytest.mark.exhaustive
def test_ctrl_c_says_what_the_run_goes_on_from(job: Path, tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    folders = [tmp_path / "two", tmp_path / "one"]
    for folder, ranks in zip(folders, (2, 1), strict=True):
        words = ("--set", f"run_dir={folder}", "--set", "checkpoint.every_steps=10", "--ranks", ranks)
        started.append(start(*TRAIN, job, *words))
    for folder, process in zip(folders, started, strict=True):
        wait_until(partial(has_checkpoint, folder))
        os.killpg(process.pid, signal.SIGINT)
    for folder, process in zip(folders, started, strict=True):
        code, _, err = finish(process)
        (run,) = folder.iterdir()
        newest = sorted(path.name for path in (run / "checkpoints").glob("step-*") if (path / "manifest.json").exists())[-1]
        assert code == 130
        assert err == f"shardembed: stopped; {run} holds {newest}: give the same command again to go on from there\n"


@pytest.mark.exhaustive  # tests/kill has a sample of such ends
def test_a_rank_that_is_killed_ends_the_job_and_is_named(job: Path, started: list[subprocess.Popen[str]]) -> None:
    process = start(*TRAIN, job, *UNSAVED, "--ranks", 2, *WORKERS)
    started.append(process)
    read_until(process, "held by each rank")
    ranks = rank_processes(process.pid)
    wait_until(lambda: all(workers_of(rank) for rank in ranks.values()))
    workers = [worker for rank in ranks.values() for worker in workers_of(rank)]
    os.kill(ranks[1], signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 1
    # Gloo's own code may write that nobody answers any more, after the file that says so: it depends on where the other rank was.
    told = [line for line in err.splitlines() if not line.startswith("[/")]
    assert len(told) == 1
    assert told[0].startswith("shardembed: error: rank 1 was killed by SIGKILL; if memory ran out, use more ranks")
    assert not Path(f"/proc/{ranks[0]}").exists()
    wait_until(lambda: all(gone(pid) for pid in workers))


@pytest.mark.exhaustive
def test_a_malformed_row_is_told_once_by_two_ranks(job: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.tsv"
    bad.write_text("user\titem\n" + "1\t2\n" * 50 + "1\n" + "1\t3\n" * 50)
    code, out, err = finish(start(*TRAIN, job, "--ranks", 2, "--set", f"data.path={bad}"))
    skipped = "(or leave out such rows, by data.on_bad_row: skip)"
    told = f"shardembed: error: {bad}:52: 1 field(s), but the header line has 2 {skipped}\n"
    assert (code, out, err) == (2, "", told)


@pytest.mark.exhaustive
def test_a_failure_of_rank_0_alone_ends_the_job_and_wrong_input_is_not_tried_again(job: Path) -> None:
    code, _, err = finish(start(*TRAIN, job, "--ranks", 2, "--set", "run_dir=/dev/null/x", "--max-restarts", 3))
    assert code == 2
    assert err.startswith("shardembed: error: run_dir: cannot make /dev/null/x/job-")
    assert err.endswith("Not a directory; set run_dir to another folder\n")
    assert len(err.splitlines()) == 1
