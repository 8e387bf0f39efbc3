"""No thread of a compiled Triton kernel can store what another has yet to load. See `races`, `compile_races`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import shardembed.kernels.triton
from tests.amount import exhaustive
from tests.unit.kernels import compile_triton
from tests.unit.kernels.races import alone

HERE = Path(__file__).parent
REPOSITORY = Path(__file__).parents[3]
OF_WIDTHS = {"_lookup", "_merge", "_sum_pieces", "_update"}
LAUNCHED = re.compile(r"\blaunch\(\s*(_\w+)")
BLOCKED = "#ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [2, 16], warpsPerCTA = [2, 1], order = [1, 0]}>"


def compiled(kind: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_races.py"), kind]
    ended = subprocess.run(command, env=environment | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.parametrize(("kind", "least"), [("sample", 19), exhaustive("classes", 900), exhaustive("widths", 1024)])
def test_what_is_loaded_is_stored_behind_a_barrier_or_by_the_same_thread(kind: str, least: int) -> None:
    *found, racing, kept = compiled(kind)
    assert racing["races"], "a kernel like the update's, without a barrier, is not told from one with"
    assert kept["races"] == []
    assert len(found) >= least
    assert [said for said in found if said["races"]] == []
    if kind != "widths":
        assert {said["kernel"] for said in found} == OF_WIDTHS


def test_every_kernel_is_looked_at() -> None:
    """Those whose code depends on the width here, the others by `compile_triton`."""
    folder = Path(shardembed.kernels.triton.__file__).parent
    launched = {name for path in folder.glob("*.py") for name in LAUNCHED.findall(path.read_text())}
    assert launched > OF_WIDTHS
    there = set(re.findall(r"\.(_\w+)\b", Path(compile_triton.__file__).read_text()))
    assert launched - OF_WIDTHS - there == set()


def test_layouts_are_read_as_triton_writes_them() -> None:
    assert alone(BLOCKED, [4, 64])
    assert not alone(BLOCKED, [2, 64]), "the second warp has what the first has"
    assert not alone(f"#ttg.slice<{{dim = 1, parent = {BLOCKED}}}>", [4])
    in_one = "#ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [32, 1], warpsPerCTA = [2, 1], order = [1, 0]}>"
    assert alone(f"#ttg.slice<{{dim = 1, parent = {in_one}}}>", [64])
    assert not alone(f"#ttg.slice<{{dim = 1, parent = {in_one}}}>", [32])
    linear = "#ttg.linear<{register = [[0, 1]], lane = [[1, 0], [2, 0]], warp = [[4, 0]], block = []}>"
    assert alone(linear, [8, 2])
    assert not alone(linear.replace("warp = [[4, 0]]", "warp = [[0, 0]]"), [4, 2])
    assert not alone("#ttg.of_tomorrow<{}>", [4])
