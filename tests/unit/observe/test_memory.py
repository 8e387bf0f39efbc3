"""Where tables and freed buffers lie in memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shardembed.kernels.memory import HUGE_PAGE, on_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_large_table_lies_on_huge_pages() -> None:
    if not SETTING.exists() or "[never]" in SETTING.read_text():
        pytest.skip("this system grants no huge pages")
    table = on_huge_pages(torch.empty(8 * HUGE_PAGE, dtype=torch.uint8)).fill_(1)
    maps = Path("/proc/self/smaps").read_text()
    held = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", maps, flags=re.MULTILINE)
    for part in held[1:]:
        first, last = (int(end, 16) for end in part.split(" ", 1)[0].split("-"))
        if first <= table.data_ptr() + 2 * HUGE_PAGE < last:
            found = re.search(r"VmFlags:.*\bhg\b", part)
            assert found, "the mapping is marked for huge pages"
            return
    raise AssertionError("the table lies in no mapping")


def test_small_and_empty_tensors_are_left_alone() -> None:
    for size in (0, 10, HUGE_PAGE):
        tensor = torch.zeros(size, dtype=torch.uint8)
        assert on_huge_pages(tensor) is tensor


# Page faults while some large buffers are written and freed again and again; in a process of its own, since malloc's settings stay.
FAULTS = """
import resource, sys, torch
from shardembed.kernels.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    held = [torch.ones(mib << 18) for mib in (31, 30, 29, 28)]
step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


@pytest.mark.exhaustive
@linux
def test_freed_buffers_stay_with_the_process() -> None:
    run = [sys.executable, "-c", FAULTS]
    kept, given_back = (int(subprocess.check_output([*run, how])) for how in ("keep", "leave"))
    assert kept < given_back / 3, "a buffer is paid for once, and not each time"
