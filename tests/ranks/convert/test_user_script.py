"""A training script as people write it (DDP, a scheduler, clipping, autocast), and the same with its tables sharded."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "tests" / "scripts"


def run(*command: str) -> float:
    """The loss that a script prints after training."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return float(ran.stdout)


def test_the_scripts_differ_by_a_few_lines() -> None:
    plain, sharded = ((SCRIPTS / name).read_text().splitlines() for name in ("train_plain.py", "train_sharded.py"))
    added = [line for line in difflib.ndiff(plain, sharded) if line.startswith("+ ") and line.strip("+ ")]
    # The docstring, two imports, rank and world size, shard, DDP, the optimizer, and clipping.
    assert len(added) == 8, added


@pytest.mark.exhaustive
def test_a_script_learns_the_same_sharded_over_two_ranks() -> None:
    plain = run(str(SCRIPTS / "train_plain.py"))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    sharded = run(*launch, str(SCRIPTS / "train_sharded.py"))
    assert plain < 0.4, "it did not learn; untrained it is about 0.7"
    # bfloat16 gradients of half a batch are rounded in another way.
    assert abs(sharded - plain) < 0.02
