"""Compiled kernels on the disk, for the next process: of use where that works, and never needed.

Numba lets whatever goes wrong there (a full disk, a folder that may not be written, a file that was cut short) end the call that
wanted a kernel. Here it is said once, and kernels are compiled in each process.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.runtime import rtsys

from shardembed.config.collector import uncollected

log = logging.getLogger("shardembed")
ARRAYS = "numba.np.arraymath"
_told: set[int] = set()  # processes; a fork is one of its own


@cache
def _neighbours() -> tuple[tuple[str, int, int], ...]:
    """When the files beside this one were written, and their sizes."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


class _Cache(FunctionCache):
    def __init__(self, py_func: Any) -> None:
        super().__init__(py_func)
        # Numba looks at the kernel's own file alone, and functions of the files beside it have become part of the kernel.
        stamp = self._impl.locator.get_source_stamp(), _neighbours()
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            # Not Numba's own: that first loads all that Numba can compile, SciPy's linear algebra among it, which takes six times
            # as long as a kernel's machine code. Where there is none, the compiler loads it.
            rtsys.initialize(target_context)
            with uncollected(), _without_blas():
                return self._load_overload(sig, target_context)
        except OSError as error:
            _tell(error)
        except Exception as error:  # a file that was cut short fails in many ways; what is saved next replaces it
            log.info("compiled kernels that cannot be read are made anew: %s", error)
            with suppress(OSError):
                self.flush()
        return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            self.disable()
            _tell(error)


@contextmanager
def _without_blas() -> Iterator[None]:
    """Let kernels that were compiled with Numba's array functions (sums, say) be loaded without SciPy. Numba's module of them asks,
    when it is imported, whether SciPy has a BLAS, and importing that takes longer than all else here. Nobody needs the answer but
    who compiles a product of matrices, and he asks again.
    """
    if ARRAYS in sys.modules:
        yield
        return
    linalg: Any = importlib.import_module("numba.np.linalg")
    asked = linalg.ensure_blas
    linalg.ensure_blas = lambda: None
    try:
        yield
    finally:
        linalg.ensure_blas = asked
        arrays: Any = sys.modules.get(ARRAYS)
        if arrays is not None:
            arrays.ensure_blas = asked
            arrays._HAVE_BLAS = importlib.util.find_spec("scipy") is not None


def kept_on_disk(dispatcher: Any) -> Any:
    """The kernel, cached where that is possible (Numba's `cache=True` but for what is said above)."""
    try:
        dispatcher._cache = _Cache(dispatcher.py_func)
    except (OSError, RuntimeError) as error:  # the latter: no folder can be written
        _tell(error)
    return dispatcher


def _tell(error: Exception) -> None:
    """Once a process, and of the ranks of a machine by the first."""
    if os.getpid() not in _told and os.environ.get("LOCAL_RANK", "0") == "0":
        _told.add(os.getpid())
        log.warning(
            "compiled kernels cannot be kept on the disk (%s), so every process spends some seconds on compiling them: set "
            "NUMBA_CACHE_DIR to a folder with room that may be written",
            error,
        )
