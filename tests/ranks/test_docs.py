"""The Python blocks of README.md and of pages in docs/ run as they stand: alone, and under torchrun on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = {
    page: re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for page in ("README.md", "docs/checkpoints.md", "docs/speed.md")
}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SECONDS = 300  # a script that has not ended by then hangs, however loaded the machine is


def run(folder: Path, block: int, *launcher: str, page: str = "README.md") -> str:
    """What the block prints on stdout. It starts without the environment of a job, in a folder of its own."""
    (folder / "train.py").write_text(BLOCKS[page][block], encoding="utf-8")
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *launcher, "train.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{page}, block {block}:\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "two ranks"])
def test_the_loop_learns(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    printed = re.findall(r"^step (\d+): loss (\d+\.\d+)$", run(tmp_path, 0, *launcher), flags=re.MULTILINE)
    steps, losses = [int(step) for step, _ in printed], [float(loss) for _, loss in printed]
    assert steps == sorted(set(steps))  # one rank prints, each step once
    assert losses[0] == pytest.approx(0.69, abs=0.1)  # ln 2: a coin is tossed
    assert losses[-1] < 0.62


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "two ranks"])
def test_the_collection_answers_with_the_shapes_it_prints(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    printed = run(tmp_path, 1, *launcher)
    ranks = 2 if launcher else 1
    assert printed.count("{'user': (2, 64), 'item': (2, 64), 'history': (5, 64)}") == ranks


def test_training_goes_on_alone_where_two_ranks_left_it_and_its_rows_are_read_without_a_job(tmp_path: Path) -> None:
    page = "docs/checkpoints.md"
    assert run(tmp_path, 0, *TORCHRUN, page=page) == "['step-0000000005', 'step-0000000010']\n"
    alone = run(tmp_path, 0, page=page)
    assert alone.startswith("rank 0 goes on at step 10, saved by 2 rank(s)\n")
    assert alone.endswith("['step-0000000010', 'step-0000000015', 'step-0000000020']\n")
    assert run(tmp_path, 1, page=page) == "torch.Size([2, 16])\n"


@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["alone", "two ranks"])
def test_stages_and_memory_are_told_of_a_loop_that_sends_ids_ahead(tmp_path: Path, launcher: tuple[str, ...]) -> None:
    printed = run(tmp_path, 0, *launcher, page="docs/speed.md")
    assert printed.endswith("20 steps\n")
    assert f"20 step(s) on {2 if launcher else 1} rank(s)" in printed
    for line in ("send ids (beside)", "wait for ids", "optimizer state", "table items"):
        assert line in printed, printed


def test_every_block_is_run() -> None:
    assert [len(blocks) for blocks in BLOCKS.values()] == [2, 2, 1]
