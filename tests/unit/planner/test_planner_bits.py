"""The same problem has the same plan and the same bound, bit for bit, however busy the machine is, on one core and on all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.amount import exhaustive

BUSY = "while True: pass"


def last() -> None:
    os.nice(19)


def last_on_one_core() -> None:
    last()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@contextmanager
def busy_loops(count: int) -> Iterator[None]:
    # As nice as what runs beside them, which would take an hour otherwise.
    loops = [subprocess.Popen([sys.executable, "-c", BUSY], preexec_fn=last) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def told(count: int, before: Callable[[], None] | None = None) -> str:
    command = [sys.executable, "-m", "tests.unit.planner.bits", str(count)]
    return subprocess.run(command, check=True, capture_output=True, text=True, preexec_fn=before).stdout.strip()


@pytest.mark.parametrize("count", [exhaustive(500)])
def test_plans_and_bounds_are_the_same_bits_behind_two_busy_loops(count: int) -> None:
    with busy_loops(2):
        busy = told(count, last_on_one_core)
    # As a process too: what Hypothesis draws depends on the modules that are loaded.
    assert busy == told(count)
