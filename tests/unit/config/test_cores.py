"""Threads of the command: what is chosen, what is left as the user has set it, and what is said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardembed.config import cores

ROOT = Path(__file__).parents[3]
SLEEP = "those that wait sleep after some microseconds (OMP_WAIT_POLICY=PASSIVE, GOMP_SPINCOUNT=5000)"
TELL = "import os, json, shardembed; print(json.dumps(dict(os.environ)))"


def environment(**settings: str) -> dict[str, str]:
    left = {name: value for name, value in os.environ.items() if name not in (cores.THREADS, cores.WAITING, *cores.OTHER_WAITING)}
    return {**left, "PYTHONPATH": str(ROOT), **settings}


@pytest.mark.parametrize(
    ("given", "allowed", "wanted"),
    [
        ({}, None, cores.CHOSEN_WAITING),
        ({"OMP_NUM_THREADS": "1"}, None, cores.CHOSEN_WAITING),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, None, {}),
        ({"GOMP_SPINCOUNT": "100"}, None, {}),
        ({"KMP_BLOCKTIME": "0"}, None, {}),
        ({}, 2.5, {**cores.CHOSEN_WAITING, "OMP_NUM_THREADS": "2"}),
        ({}, 0.5, {**cores.CHOSEN_WAITING, "OMP_NUM_THREADS": "1"}),
        ({}, 9.0, cores.CHOSEN_WAITING),
        ({"OMP_NUM_THREADS": "7"}, 2.5, cores.CHOSEN_WAITING),
    ],
)
def test_only_what_is_not_set_is_chosen(given: dict[str, str], allowed: float | None, wanted: dict[str, str]) -> None:
    settings = dict(given)
    assert set(cores.settle(settings, 8, allowed)) == set(wanted)
    assert settings == {**given, **wanted}


def test_the_command_is_told_from_programs_that_import_the_library() -> None:
    assert cores.is_command(["/usr/bin/shardembed", "train"], ["python", "/usr/bin/shardembed", "train"])
    assert cores.is_command(["-m", "train"], ["python", "-u", "-m", "shardembed", "train"])
    assert not cores.is_command(["-m", "x"], ["python", "-m", "pytest", "x"])
    assert not cores.is_command(["train.py", "shardembed"], ["python", "train.py", "shardembed"])
    assert not cores.is_command(["-c"], ["python", "-c", "import shardembed"])
    assert not cores.is_command([], ["python"])


def test_a_program_of_somebody_else_is_left_as_it_is() -> None:
    given = environment()
    found = json.loads(subprocess.check_output([sys.executable, "-c", TELL], env=given, text=True))
    assert not {cores.WAITING, cores.THREADS, *cores.OTHER_WAITING} & set(found)


def test_the_command_says_what_it_has_chosen(tmp_path: Path) -> None:
    """In a process of its own, since the choice comes before the import of torch."""
    job = "data: {generator: {users: 20, items: 10, interactions: 100}}\ntrain: {max_steps: 1}\nlog: {page: false}\n"
    (tmp_path / "job.yaml").write_text(f"{job}run_dir: {tmp_path}\n")
    words = [sys.executable, "-m", "shardembed", "train", str(tmp_path / "job.yaml")]
    left = {name: value for name, value in environment().items() if name not in ("RANK", "WORLD_SIZE")}
    said = subprocess.check_output(words, env=left, text=True)
    if cores.usable() > 1:
        assert SLEEP in " ".join(said.split())  # lines may be broken


def test_what_is_said() -> None:
    assert cores.said(2, {}, ["OMP_WAIT_POLICY"]).endswith(f"; {SLEEP}")
    assert cores.said(2, {"OMP_WAIT_POLICY": "ACTIVE"}, []).endswith("; those that wait: OMP_WAIT_POLICY=ACTIVE")
    assert cores.said(2, {}, []).endswith("; OMP_WAIT_POLICY is not set, so those that wait may spin")
    assert "as many as this container may keep busy" in cores.said(2, {}, ["OMP_NUM_THREADS", "OMP_WAIT_POLICY"])
    assert ";" not in cores.said(1, {}, [])
    assert cores.said(1, {"OMP_NUM_THREADS": "1"}, ["OMP_WAIT_POLICY"]).endswith("(OMP_NUM_THREADS)")


def test_the_allowance_of_a_container(tmp_path: Path) -> None:
    own = tmp_path / "cgroup"
    assert cores.allowance(tmp_path, own) is None
    own.write_text("5:cpu:/x\n0::/pod/this\n")
    (tmp_path / "pod" / "this").mkdir(parents=True)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.allowance(tmp_path, own) is None
    (tmp_path / "pod" / "this" / "cpu.max").write_text("250000 100000\n")
    assert cores.allowance(tmp_path, own) == 2.5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert cores.allowance(tmp_path, own) == 1.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "pod" / "this" / "cpu.max").write_text("nonsense\n")
    assert cores.allowance(tmp_path, own) is None
