"""A small training job, and commands that launch it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 300  # a command that has not ended by then hangs, however loaded the machine is
JOB = """
data:
  generator: {users: 100, items: 50, interactions: 900, tastes: 5}
model: {embedding_dim: 8, negatives: 16}
train: {epochs: 1000, global_batch_size: 40, max_steps: STEPS}
checkpoint: {every_steps: 10}
"""
OF_A_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def write_job(folder: Path, steps: int) -> Path:
    path = folder / "job.yaml"
    path.write_text(JOB.replace("STEPS", str(steps)) + f"run_dir: {folder / 'runs'}\n")
    return path


def start(folder: Path, *words: object, **settings: str) -> subprocess.Popen[str]:
    """Run a command from the clone, as the head of a process group of its own; what it prints goes to `folder`/printed."""
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_JOB}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **settings}
    with open(folder / "printed", "w") as printed:  # not a pipe: nobody would read it until the end
        return subprocess.Popen(
            [*map(str, words)],
            stdout=printed,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )


def finish(folder: Path, process: subprocess.Popen[str]) -> str:
    """Wait for the command to succeed; what it printed."""
    code = process.wait(timeout=SECONDS)
    printed = (folder / "printed").read_text()
    assert code == 0, printed
    return printed


def end(process: subprocess.Popen[str]) -> None:
    """End what is left of a command, with its ranks, which torchrun puts into sessions of their own and ends itself."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool]) -> None:
    """Look until `condition` holds; the time that has passed says nothing."""
    until = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)


def saved(job: Path) -> int:
    """The step of the newest complete checkpoint of the only run; 0 where there is none."""
    return max((int(path.name[5:15]) for path in job.parent.glob("runs/*/checkpoints/step-*")), default=0)


def working_on(job: Path) -> list[int]:
    """The processes that have the job among their arguments, whoever started them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        if str(job).encode() in words:
            found.append(int(folder.name))
    return found


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])
