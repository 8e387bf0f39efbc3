"""A training command whose processes are killed: ranks start again and go on, listen on loopback alone, and leave no orphans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import saved, wait_until, write_job
from tests.ranks.recipes.test_recipes_command import TORCHRUN, TRAIN, finish, gone, rank_processes, start, started

__all__ = ["started"]  # a fixture

STEPS = 400  # far more than are taken before somebody is killed
SCRIPT = """
import os, pathlib, sys, time
import shardembed as se
se.init()
new = pathlib.Path(sys.argv[1]) / f".{se.rank()}"
new.write_text(str(os.getpid()))
new.rename(new.with_name(f"rank-{se.rank()}"))
time.sleep(3600)
"""  # as a user's own, which is busy with something else
LISTENS = "0A"  # a state in /proc/net/tcp
LOOPBACK = ("0100007F", "00000000000000000000000001000000")  # 127.0.0.1 and ::1, as the kernel writes them

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    return write_job(tmp_path, STEPS)


def listening(pids: list[int]) -> list[str]:
    """The addresses at which these processes listen."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except FileNotFoundError:  # closed since: a file, for sockets stay open
                continue
            if target.startswith("socket:["):
                sockets.add(target[len("socket:[") : -1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and fields[9] in sockets:
                found.append(fields[1].split(":")[0])
    return found


@pytest.mark.exhaustive
def test_a_run_goes_on_after_a_rank_was_killed_and_then_the_launcher(job: Path, started: list[subprocess.Popen[str]]) -> None:
    # `--fresh` is for the first start: the second one goes on.
    process = start(*TRAIN, job, "--ranks", 2, "--max-restarts", 3, "--fresh")
    started.append(process)
    wait_until(lambda: saved(job) > 0)
    ranks = rank_processes(process.pid)
    addresses = listening([process.pid, *ranks.values()])
    assert len(addresses) > 2  # the store, and Gloo's of every rank
    assert set(addresses) <= set(LOOPBACK)
    os.kill(ranks[1], signal.SIGKILL)
    wait_until(lambda: gone(ranks[0]))
    before = saved(job)
    wait_until(lambda: saved(job) > before)

    ranks = rank_processes(process.pid)
    process.kill()
    wait_until(lambda: all(gone(pid) for pid in ranks.values()))
    _, out, err = finish(process)
    assert err == "shardembed: rank 1 was killed by SIGKILL; restart 1 of 3\n"
    assert f"at step {before} of 400 (saved on 2 ranks, now 2); --fresh begins a new run instead" in out

    kept = saved(job)
    code, out, err = finish(start(*TRAIN, job, "--json"))
    assert code == 0, err
    assert f"at step {kept} of 400 (saved on 2 ranks, now 1)" in err
    summary = json.loads(out)
    assert (summary["ranks"], summary["steps"]) == (1, STEPS)
    (folder,) = (job.parent / "runs").iterdir()
    _, *records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [record for record in records if not {"evaluation", "ids"}.intersection(record)]
    assert [record.get("step") for record in records] == [*range(1, STEPS + 1), None]
    assert summary["losses"] == [record["loss"] for record in records[:20]]


@pytest.mark.exhaustive
@pytest.mark.parametrize("script", [None, SCRIPT], ids=["command", "script behind a shell"])
def test_ranks_end_with_a_torchrun_agent_that_is_killed(
    job: Path, tmp_path: Path, started: list[subprocess.Popen[str]], script: str | None
) -> None:
    words: list[object] = [*TRAIN, job]
    if script is not None:
        (tmp_path / "script.py").write_text(script)
        words = ["--no-python", "bash", "-c", f"{sys.executable} {tmp_path / 'script.py'} {tmp_path}; true"]
    process = start(*TORCHRUN, *words)
    started.append(process)
    wait_until(lambda: saved(job) > 0 if script is None else len(list(tmp_path.glob("rank-*"))) == 2)
    ranks = list(rank_processes(process.pid).values())
    if script is not None:
        ranks = [int(path.read_text()) for path in tmp_path.glob("rank-*")]
    assert len(ranks) == 2
    process.kill()  # nobody is told
    wait_until(lambda: all(gone(pid) for pid in ranks))


@pytest.mark.exhaustive
def test_ranks_that_torchrun_starts_again_go_on(job: Path, started: list[subprocess.Popen[str]]) -> None:
    """Its store keeps what the ranks before wrote, such as the addresses at which they listened."""
    process = start(*TORCHRUN, "--max-restarts", 1, *TRAIN, job, "--fresh", "--max-steps", 200)
    started.append(process)
    wait_until(lambda: saved(job) > 0)
    os.kill(rank_processes(process.pid)[1], signal.SIGKILL)
    code, out, err = finish(process)
    assert code == 0, err
    assert " of 200 (saved on 2 ranks, now 2); --fresh begins a new run instead" in out
    assert len(list((job.parent / "runs").iterdir())) == 1
