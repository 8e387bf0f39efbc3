"""Checks that are programs of their own: the bandwidth of the kernels, and the tests that are for GPUs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.on_gpu.check import Here, NotSeenError

ROOT = Path(__file__).parents[2]
TESTS = ("tests/gpu",)  # those of the kernels under tests/unit compile for longer than there is time
SIZES = ["--widths", "16", "64", "256", "--ids", "1", "20", "--skews", "0", "1.05", "--rows", "4000000", "--rounds", "7"]


def bandwidth(here: Here) -> Iterator[str]:
    """Against copies, plain torch and FBGEMM, by `benchmarks.gpu`."""
    from benchmarks import gpu

    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.md"
        gpu.main([*SIZES, "--markdown", str(page)])
        lines = page.read_text().splitlines()
    yield from lines[next(number for number, line in enumerate(lines) if line.startswith("Device")) :]


def tests(here: Here) -> Iterator[str]:
    """`pytest --gpu`."""
    missing = [name for name in ("pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        raise NotSeenError(f"the tests need {' and '.join(missing)}, which this Python has not")
    command = [sys.executable, "-m", "pytest", "--gpu", "-q", "-p", "no:cacheprovider", "--no-header", "-rfEs", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "SKIPPED")) or " passed" in line]
    yield from lines or done.stdout.splitlines()[-5:] + done.stderr.splitlines()[-5:]
    assert not done.returncode, f"pytest ended with {done.returncode}"
