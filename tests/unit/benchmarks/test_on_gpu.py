"""`make gpu` without a GPU: what it says of what it sees and of what it does not; no speed is looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.on_gpu import __main__ as gpu
from benchmarks.on_gpu import child, counting, jobs, others, updates
from benchmarks.on_gpu.check import Check, Here, NotSeenError, Verdict
from benchmarks.on_gpu.checks import CHECKS
from shardembed.kernels import grouping, reference
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData
from shardembed.kernels.triton import order, update
from shardembed.optim import SGD, Lion
from tests.harness import run_ranks

ROOT = Path(__file__).parents[3]
SMALL = Here(torch.device("cpu"), 0)


def verdict_of(run: Callable[[Here], Iterator[str]], folder: Path, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[Any]:
    monkeypatch.setitem(CHECKS, "it", Check("it", run, 1.0, "all of it", **given))
    child.main("it", str(folder / "verdict"))
    return json.loads((folder / "verdict").read_text())[:3]


def test_a_check_passes_fails_or_has_not_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saying(error: Exception | None = None) -> Callable[[Here], Iterator[str]]:
        def run(here: Here) -> Iterator[str]:
            yield "a line"
            if error:
                raise error

        return run

    def verdict(error: Exception | None = None, **given: Any) -> list[Any]:
        return verdict_of(saying(error), tmp_path, monkeypatch, **given)

    assert verdict() == ["it", "passes", ["a line"]]
    assert verdict(measures=True) == ["it", "measured", ["a line"]]
    assert verdict(AssertionError("12 wrong")) == ["it", "FAILS", ["a line", "AssertionError: 12 wrong"]]
    assert verdict(NotSeenError("no twin")) == ["it", "not seen", ["a line", "not seen: no twin"]]
    assert verdict(torch.OutOfMemoryError("2 GiB\nmore"))[1:] == [
        "not seen",
        ["a line", "not seen: the GPU has too little memory: 2 GiB"],
    ]
    assert verdict(ModuleNotFoundError("", name="scipy.sparse"))[1:] == [
        "not seen",
        ["a line", "not seen: it needs scipy, which this Python has not"],
    ]
    assert verdict(ModuleNotFoundError("no such room", name="shardembed.room"))[1] == "FAILS"
    assert verdict(needs_gpu=True) == ["it", "not seen", ["not seen: all of it"]]


def test_a_wrong_update_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(" 0 wrong numbers" in line for line in updates.rowwise(SMALL))

    update_as_it_is = update.update
    monkeypatch.setattr(update, "update", lambda *given: (update_as_it_is(*given), given[0].state["sum"].add_(0.01))[0])
    with pytest.raises(AssertionError, match=r"RowwiseAdagrad, 3 columns: [1-9][0-9]* wrong numbers"):
        list(updates.rowwise(SMALL))


def in_plain_torch(data: SlabData, waiting: Gradients, order: object, lr: float, number: int) -> None:
    reference.update(data, *grouping.merge(waiting, len(data.weights)), Step(lr, number))


def test_right_updates_at_real_sizes_are_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hot rows go far and come back; in narrow dtypes they bring along what they were rounded by."""
    monkeypatch.setattr(Here, "small", False)
    monkeypatch.setattr(order, "order", lambda *given: None)
    monkeypatch.setattr(update, "update", in_plain_torch)
    for dtype in updates.NARROW:
        assert [off for _, off, _ in updates.steps(SMALL, SGD(0.1), 64, dtype)] == [0, 0]


def test_no_sum_of_whole_numbers_leaves_the_sign_of_an_update_to_rounding() -> None:
    """Where Lion's sum is next to nothing, a right kernel may have another sign than float64."""

    def signs(lion: Lion, dtype: torch.dtype) -> torch.Tensor:
        b1, b2 = lion.betas
        before = torch.arange(-1000, 1001).to(dtype)
        return torch.sign(b1 * ((1 - b2) * before) + (1 - b1) * before[:, None])

    for lion, same in ((updates.SETTINGS[Lion], True), (Lion(0.1), False)):
        assert isinstance(lion, Lion)
        assert torch.equal(signs(lion, torch.float32).double(), signs(lion, torch.float64)) == same


def test_weights_that_end_elsewhere_are_found() -> None:
    assert list(jobs.said({"plain": 1e-6})) == ["plain: weights differ from the CPU's by 1e-06 at most"]
    for far in (0.01, float("nan")):
        with pytest.raises(AssertionError, match="plain: weights differ"):
            list(jobs.said({"plain": far}))
    lost = [torch.zeros(2, 3), torch.tensor([[1.0, float("nan")]])]
    assert math.isnan(jobs.far(lost, [torch.zeros(2, 3), torch.ones(1, 2)])), "in a table that is not the first"


def collectives(rank: int, world_size: int) -> None:
    jobs.make_calls(rank, torch.device("cpu"), "gloo")


@pytest.mark.exhaustive  # two processes that import all
def test_the_collectives_of_the_check_are_right() -> None:
    run_ranks(2, collectives)


def test_a_step_of_the_count_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(counting, "MANY", 4)
    assert counting._step(torch.device("cpu"), 4, 2) == {"launches": 0, "waits": 0}

    monkeypatch.setattr(Here, "small", False)
    monkeypatch.setattr(counting, "FEW", 2)
    monkeypatch.setattr(counting, "_step", lambda *given: {"launches": 0, "waits": 0})
    with pytest.raises(NotSeenError, match="no launch at all"):  # no launch is no proof that there are few
        list(counting.launches(SMALL))


@pytest.mark.exhaustive
def test_a_rank_that_fails_is_named() -> None:
    with pytest.raises(AssertionError, match=r"rank \d of 2: ZeroDivisionError"):
        jobs.ranks(2, broken, SMALL, jobs.GLOO)


def broken(rank: int, here: Here) -> dict[str, float]:
    return {"": 1 / 0}


@pytest.mark.exhaustive
def test_the_page_names_what_was_seen_and_what_was_not(tmp_path: Path) -> None:
    """As `make gpu` runs it on a machine without a GPU, here one check and one that needs one."""
    file = tmp_path / "page.md"
    command = [ROOT / ".ci" / "gpu", "large", "over-nccl", "--markdown", file]
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    page = file.read_text()
    assert page.startswith("# GPU code on no GPU, 20")
    assert "| [large](#large) | tables of more than 2^31 elements | passes |" in page
    assert "Fails: nothing. Not seen: over-nccl, rowwise, one-rank, over-gloo, dynamic, optimizers" in page.replace("\n", " ")
    for name, check in CHECKS.items():
        assert f"- {name}: {check.hidden}\n" in page, "what nobody has seen"
        assert f"  {name}: {check.hidden}\n" in done.stdout


def test_a_check_that_hangs_is_stopped_and_the_job_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu.look("large", 0.05, dict(os.environ))
    assert found.status == "not seen"
    assert found.lines[-1].startswith(gpu.STOPPED)
    for verdict, code in ((found, 1), (Verdict("large", "FAILS", ("x",), 1.0), 1), (Verdict("large", "passes", (), 1.0), 0)):
        monkeypatch.setattr(gpu, "look", lambda *given, verdict=verdict: verdict)
        assert gpu.main(["large", "--markdown", str(tmp_path / "page.md")]) == code
    assert gpu.main(["large", "--seconds", "1", "--markdown", str(tmp_path / "page.md")]) == 0
    assert "there was no time left" in (tmp_path / "page.md").read_text()


def test_a_page_names_the_commit(tmp_path: Path) -> None:
    assert gpu.commit(tmp_path) == "unknown", "no checkout"
    page = " ".join(gpu.page([], [], []).split())
    assert f"Commit {gpu.commit()};" in page

    def git(*arguments: str) -> str:
        named = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *named, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert gpu.commit(tmp_path) == "unknown", "no commit"
    (tmp_path / "file").write_text("as committed")
    git("add", "file")
    git("commit", "-q", "-m", "first")
    assert gpu.commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("as changed")
    assert gpu.commit(tmp_path) == f"{git('rev-parse', 'HEAD')} and changes to it"
    (tmp_path / "folder").mkdir()
    assert gpu.commit(tmp_path / "folder") == "unknown", "a folder that lies in a checkout of something else"


def test_a_check_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["fast"])
    assert "there is no check fast; there are rowwise, large" in capsys.readouterr().err


def test_a_package_that_a_gpu_machine_lacks_does_not_keep_other_tests_from_running() -> None:
    """One file of tests that cannot be imported would end them all."""
    missing = ["pydantic", "scipy", "yaml", "numba", "safetensors", "fbgemm_gpu"]
    code = (
        f"import sys; sys.modules |= dict.fromkeys({missing})\n"
        "sys.argv = ['pytest', '--gpu', '--collect-only', '-q', '-p', 'no:cacheprovider', 'tests/gpu']\n"
        "import pytest; sys.exit(pytest.main(sys.argv[1:]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_came_of_tests_is_told_file_by_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the others are stopped, it is known all the same."""
    monkeypatch.setattr(others, "TESTS", ("tests/gpu/test_fbgemm.py", "tests/gpu/test_host.py"))
    first, second, *rest = others.tests(SMALL)
    assert (first, second) == ("tests/gpu/test_fbgemm.py: 1 skipped", "tests/gpu/test_host.py: 1 skipped")
    assert any("needs a CUDA device" in line for line in rest)

    def told() -> Iterator[str]:
        yield "tests/gpu/test_a.py::test_x[a b] PASSED [ 10%]"
        yield "tests/gpu/test_a.py::test_y FAILED [ 20%]"
        yield "tests/gpu/test_b.py::test_z PASSED [ 30%]"
        raise TimeoutError

    assert next(others.outcomes(told())) == "tests/gpu/test_a.py: 1 passed, 1 failed"
