"""Which kernel updates a slab: chosen once, from facts alone, and logged."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from shardembed.errors import ConfigError
from shardembed.kernels import fbgemm
from shardembed.optim import External, RowwiseAdagrad, TableOptimizer

Kernel = Literal["reference", "fbgemm"]
KERNELS: tuple[str, ...] = ("auto", "reference", "fbgemm")
# Seen with FBGEMM 1.8, 82k uniform ids, one core of the machine in docs/benchmarks: 46 against 15 ms at 16 columns, 50 against 30
# at 64, 51 against 60 at 128. It takes some 0.6 us a row whatever the width.
ROWWISE_WIDTH = 96
log = logging.getLogger("shardembed")


def choose(
    wanted: str, optimizer: TableOptimizer, dtype: torch.dtype, width: int, rows: int, device: torch.device, split_rows: bool
) -> Kernel:
    """FBGEMM where it gives the same numbers as the reference, else the reference; `wanted` pins one.

    Raises:
        ConfigError: the pinned kernel cannot serve this slab; the message says why.
    """
    if wanted not in KERNELS:
        raise ConfigError(f"kernel must be one of {', '.join(KERNELS)}, not {wanted!r}")
    if isinstance(optimizer, External):
        return "reference"  # which only looks up and merges: others make the update
    why_not = "it takes row statistics from the columns it sees, here only a part of each row" if split_rows else None
    why_not = why_not or fbgemm.cannot(optimizer, dtype, width, rows, device)
    if wanted == "fbgemm" and why_not:
        raise ConfigError(f"kernel='fbgemm' cannot serve {rows:,} x {width} {dtype} with {optimizer.describe()}: {why_not}")
    if not why_not and isinstance(optimizer, RowwiseAdagrad) and width < ROWWISE_WIDTH:
        why_not = f"its CPU rowwise Adagrad is slower than plain torch below {ROWWISE_WIDTH} columns"
    kernel: Kernel = "reference" if wanted == "reference" or (why_not and wanted == "auto") else "fbgemm"
    reason = f" (FBGEMM: {why_not})" if why_not and wanted == "auto" else ""
    log.info("slab of %s x %d %s, %s: kernel %s%s", f"{rows:,}", width, dtype, optimizer.describe(), kernel, reason)
    return kernel
