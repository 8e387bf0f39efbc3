"""The scripts of launch/ as two nodes run them: under a stand-in for Slurm, and in two network namespaces with a wire between."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardembed.cli import main
from tests.jobs import ROOT, end, finish, free_port, saved, start, wait_until, working_on, write_job

SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("tests/scripts/*.sh"), *ROOT.glob("tests/scripts/slurm/*")])
STAND_INS = ROOT / "tests" / "scripts" / "slurm"
NAMESPACES = ("unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the scripts are for Linux")


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        end(process)


def resumed(job: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the same command prints on one rank, in this process."""
    assert main(["train", str(job)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_valid_and_can_be_run(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):  # beyond what bash itself finds
        checked = subprocess.run(["shellcheck", script], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["slurm.sh", "two_nodes.sh"])
def test_a_script_without_arguments_says_how_it_is_used(script: str) -> None:
    ran = subprocess.run([ROOT / "launch" / script], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("usage: ")


@pytest.mark.launcher
def test_a_slurm_job_whose_time_is_up_is_requeued_and_goes_on_on_another_number_of_ranks(
    tmp_path: Path, started: list[subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, steps=300)
    settings = {
        "PATH": f"{STAND_INS}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "127.0.0.1,127.0.0.2",
        "INTERFACE": "lo",
        "PORT": free_port(),
    }
    process = start(tmp_path, ROOT / "launch" / "slurm.sh", job, **settings)
    started.append(process)
    wait_until(lambda: saved(job) > 0 or process.poll() is not None)
    assert process.poll() is None, (tmp_path / "printed").read_text()
    process.send_signal(signal.SIGUSR1)
    printed = finish(tmp_path, process)
    assert "slurm.sh: time is up; job 77 is requeued, and goes on from its newest checkpoint\nscontrol: requeue 77\n" in printed
    assert printed.count("held by each rank") == 1
    assert working_on(job) == []
    kept = saved(job)
    assert 0 < kept < 300
    assert f"at step {kept} of 300 (saved on 2 ranks, now 1)" in resumed(job, capsys)


@pytest.mark.launcher
def test_two_nodes_that_only_a_wire_connects_train_together(tmp_path: Path, started: list[subprocess.Popen[str]]) -> None:
    allowed = subprocess.run([*NAMESPACES, "ip", "link"], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"this machine gives no network namespaces: {allowed.stderr.strip()}")
    job = write_job(tmp_path, steps=20)
    process = start(tmp_path, *NAMESPACES, ROOT / "tests" / "scripts" / "two_namespaces.sh", job, RANKS_PER_NODE="1")
    started.append(process)
    assert "run folder: " in finish(tmp_path, process)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert '"ranks": 2' in summary.read_text()
