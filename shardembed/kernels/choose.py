"""Which kernel updates a slab: chosen once, from facts alone, and logged."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from shardembed.errors import ConfigError
from shardembed.kernels import cpu
from shardembed.optim import External, TableOptimizer

Kernel = Literal["reference", "numba"]
KERNELS: tuple[str, ...] = ("auto", "reference", "numba")
log = logging.getLogger("shardembed")


def choose(wanted: str, optimizer: TableOptimizer, dtype: torch.dtype, width: int, rows: int, device: torch.device) -> Kernel:
    """The compiled kernels where they serve, else the reference; `wanted` pins one.

    Raises:
        ConfigError: the pinned kernel cannot serve this slab; the message says why.
    """
    if wanted not in KERNELS:
        raise ConfigError(f"kernel must be one of {', '.join(KERNELS)}, not {wanted!r}")
    if isinstance(optimizer, External):
        return "reference"  # which only looks up and merges: others make the update
    why_not = cpu.cannot(dtype, device)
    if wanted == "numba" and why_not:
        raise ConfigError(f"kernel='numba' cannot serve {rows:,} x {width} {dtype} with {optimizer.describe()}: {why_not}")
    kernel: Kernel = "reference" if wanted == "reference" or why_not else "numba"
    reason = f" (numba: {why_not})" if why_not and wanted == "auto" else ""
    log.info("slab of %s x %d %s, %s: kernel %s%s", f"{rows:,}", width, dtype, optimizer.describe(), kernel, reason)
    return kernel
