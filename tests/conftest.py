"""What all tests share: one thread a process, repeatable examples, a stated accelerator, a sensible order."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the processes that tests start

from tests import where  # before torch, too: it hides GPUs from tests of the CPU

# isort: split
import hypothesis
import pytest
import torch

# Triton decides at its import: without a GPU, kernels run in its interpreter, here and in the processes that tests start.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from tests import harness
from tests.amount import ALL

torch.set_num_threads(1)

# "quick" and "all" find the same examples every time; `--hypothesis-profile=explore` looks for new ones.
COMMON: dict[str, Any] = {"deadline": None, "print_blob": True, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("quick", derandomize=True, max_examples=12, **COMMON)
hypothesis.settings.register_profile("all", derandomize=True, max_examples=ALL, **COMMON)
hypothesis.settings.register_profile("explore", max_examples=500, **COMMON)

HERE = Path(__file__).parent
# Cheap before dear: a mistake that a unit test can find should not wait for processes to start.
ORDER = ("unit", "docs", "ranks", "launch", "kill", "gpu")
LEFT_OUT = {"exhaustive": "--all", "matrix": "--kill-matrix", "launcher": "--launchers"}  # by marker; what has them run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="everything that is tried, and not only a sample: make test-all")
    parser.addoption(where.OPTION, action="store_true", help="on a GPU, what is for one, and nothing else: see make gpu")
    parser.addoption("--kill-matrix", action="store_true", help="kill ranks at every point, not only at a sample of them")
    parser.addoption("--launchers", action="store_true", help="launch a job in every way that launch/ has")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("all" if config.getoption("--all") else "quick")  # hypothesis then loads what it is told


def pytest_report_header(config: pytest.Config) -> list[str]:
    versions = [f"torch {torch.__version__}"]
    for name in ("fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "triton"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        accelerator = f"{len(names)} GPU(s): {', '.join(sorted(set(names)))}"
    else:
        accelerator = "no GPU: tests/gpu is skipped" if where.ON_GPU else f"no GPU is looked for without {where.OPTION}"
    scope = "everything" if config.getoption("--all") else "a sample of everything; the rest is deselected: make test-all"
    return [", ".join(versions), accelerator, scope]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    unwanted = {marker for marker, option in LEFT_OUT.items() if not config.getoption(option)}
    left_out = [item for item in items if unwanted & {mark.name for mark in item.iter_markers()}]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    if where.ON_GPU:
        others = [item for item in items if not where.belongs(_folder(item), item.path.name)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in set(others)]
    why = "and this machine has none" if where.ON_GPU else f"and without {where.OPTION} none is looked for (make gpu)"
    no_gpu = pytest.mark.skip(reason=f"needs a CUDA device, {why}")
    for item in items:
        if _folder(item) == "gpu":
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    items.sort(key=lambda item: ORDER.index(_folder(item)) if _folder(item) in ORDER else len(ORDER))


def pytest_collection_finish() -> None:
    """What is loaded by now stays: whoever collects garbage in a test, as `shard` does, need not walk all of it each time."""
    gc.collect()
    gc.freeze()


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""


@pytest.fixture(scope="session", autouse=True)
def _rank_pools() -> Iterator[None]:
    yield
    harness.close_pools()
