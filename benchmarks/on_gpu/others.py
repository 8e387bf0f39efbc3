"""Checks that are programs of their own: the bandwidth of the kernels, and the tests that are for GPUs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.on_gpu.check import Here, NotSeenError

ROOT = Path(__file__).parents[2]
TESTS = ("tests/gpu",)  # those of the kernels under tests/unit compile for longer than there is time
OUTCOME = re.compile(r"(tests/\S+\.py)::.* (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")  # a line of `pytest -v`
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
    command = [sys.executable, "-m", "pytest", "--gpu", "-v", "-p", "no:cacheprovider", "--no-header", "-rfEs", *TESTS]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    yield from outcomes(line.rstrip() for line in noted(process.stdout, lines))
    said = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED")) or " passed" in line]
    yield from said or lines[-10:]
    assert not process.wait(), f"pytest ended with {process.returncode}"


def noted(given: Iterable[str], lines: list[str]) -> Iterator[str]:
    """The same, noted on the way."""
    for line in given:
        lines.append(line.rstrip())
        yield line


def outcomes(lines: Iterable[str]) -> Iterator[str]:
    """What came of each file of tests, as soon as it is through: the others may have no time left."""
    file, found = "", Counter[str]()
    for line in lines:
        if (match := OUTCOME.match(line)) is None:
            continue
        if match[1] != file and file:
            yield f"{file}: {_counted(found)}"
            found.clear()
        file = match[1]
        found[match[2].lower()] += 1
    if file:
        yield f"{file}: {_counted(found)}"


def _counted(found: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in found.items())
