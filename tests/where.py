"""Where tests run. By default on the CPU, whatever the machine has: GPUs are hidden, or tables would lie there, where ranks of the
pool cannot reach them. With `--gpu` what is for GPUs runs, and nothing else.

This is imported before torch, which looks for GPUs once.
"""

from __future__ import annotations

import os
import sys

OPTION = "--gpu"
VARIABLE = "TESTS_ON_GPU"  # so that processes that tests start do the same
HIDDEN = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
KERNELS = "test_triton_"  # of these files: their kernels run on a GPU where there is one, else in the interpreter

ON_GPU = OPTION in sys.argv or os.environ.get(VARIABLE) == "1"
if ON_GPU:
    os.environ[VARIABLE] = "1"
else:
    os.environ.update(HIDDEN)


def belongs(folder: str, file: str) -> bool:
    """Whether a test runs with `--gpu`: by its folder in `tests`, and its file."""
    return folder == "gpu" or (folder == "unit" and file.startswith(KERNELS))
