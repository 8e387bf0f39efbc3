"""Numba's cache on the disk is of use and never needed: where it cannot be had, kernels are compiled, and that is said once."""

from __future__ import annotations

import importlib.util
import logging
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from shardembed.kernels.numba import cache  # noqa: E402
from shardembed.kernels.numba.tools import compiled  # noqa: E402

KERNEL = "def double(values):\n    for each in range(values.size):\n        values[each] *= 2\n"
SAID = "compiled kernels cannot be kept on the disk"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Compiles a kernel as a new process would, with its cache in the folder that is given and nowhere else."""
    source = tmp_path / "kernel.py"
    source.write_text(KERNEL)
    monkeypatch.setattr(cache, "_told", set())
    monkeypatch.setattr(numba.config, "CACHE_LOCATOR_CLASSES", "UserProvidedCacheLocator")
    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def made(folder: Path) -> Any:
        monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
        spec = importlib.util.spec_from_file_location("kernel", source)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "kernel", module)
        spec.loader.exec_module(module)
        return compiled(module.double)

    return made


def works(kernel: Any) -> bool:
    for dtype in (np.float32, np.float64):
        values = np.arange(4, dtype=dtype)
        kernel(values)
        if values.tolist() != [0, 2, 4, 6]:
            return False
    return True


def warnings_of(caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    return (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_a_kernel_is_made_anew_when_a_file_beside_it_changes(
    tmp_path: Path, make: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Functions of other files are compiled into it."""
    assert works(make(tmp_path))
    read = make(tmp_path)
    assert works(read)
    assert sum(read.stats.cache_hits.values()) == 2
    monkeypatch.setattr(cache, "_neighbours", lambda: (("elements.py", 1, 1),))
    anew = make(tmp_path)
    assert works(anew)
    assert not sum(anew.stats.cache_hits.values())


def test_a_kernel_is_kept_and_read_again(tmp_path: Path, make: Callable[[Path], Any], caplog: pytest.LogCaptureFixture) -> None:
    assert works(make(tmp_path / "cache"))
    again = make(tmp_path / "cache")
    assert works(again)
    assert sum(again.stats.cache_hits.values()) == 2
    assert not list(warnings_of(caplog))


def test_on_a_full_disk_it_is_compiled(tmp_path: Path, make: Callable[[Path], Any], caplog: pytest.LogCaptureFixture) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        assert works(make(tmp_path / "cache"))
        assert works(make(tmp_path / "cache"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (said,) = warnings_of(caplog)
    assert said.startswith(f"{SAID} (")
    assert "File too large" in said
    assert "NUMBA_CACHE_DIR" in said


def test_where_no_folder_can_be_written_it_is_compiled(
    tmp_path: Path, make: Callable[[Path], Any], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert works(make(tmp_path / "file"))
    (said,) = warnings_of(caplog)
    assert said.startswith(f"{SAID} (cannot cache function")


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
def test_what_was_cut_short_is_compiled_again(
    tmp_path: Path, make: Callable[[Path], Any], caplog: pytest.LogCaptureFixture, suffix: str
) -> None:
    assert works(make(tmp_path / "cache"))
    for path in (tmp_path / "cache").rglob(f"*{suffix}"):
        path.write_bytes(path.read_bytes()[:100])
    assert works(make(tmp_path / "cache"))
    again = make(tmp_path / "cache")
    assert works(again)
    assert sum(again.stats.cache_hits.values()) == 2
    assert not list(warnings_of(caplog))


def test_of_the_ranks_of_a_machine_the_first_says_it(
    tmp_path: Path, make: Callable[[Path], Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    (tmp_path / "file").write_text("")
    assert works(make(tmp_path / "file"))
    assert not list(warnings_of(caplog))
