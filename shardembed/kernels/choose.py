"""Which kernel updates a slab: chosen once, from facts alone, and logged."""

from __future__ import annotations

import logging
from typing import Literal

import torch

from shardembed.errors import ConfigError
from shardembed.kernels import cpu, triton
from shardembed.optim import NoOptimizer, TableOptimizer

Kernel = Literal["reference", "numba", "triton"]
KERNELS: tuple[str, ...] = ("auto", "reference", "numba", "triton")
log = logging.getLogger("shardembed")


def choose(wanted: str, optimizer: TableOptimizer, dtype: torch.dtype, width: int, rows: int, device: torch.device) -> Kernel:
    """The compiled kernels of the device where they serve, else the reference; `wanted` pins one.

    Raises:
        ConfigError: the pinned kernel cannot serve this slab; the message says why.
    """
    if wanted not in KERNELS:
        raise ConfigError(f"kernel must be one of {', '.join(KERNELS)}, not {wanted!r}")
    kernel: Kernel = "triton" if wanted == "triton" or (wanted == "auto" and device.type == "cuda") else "numba"
    if isinstance(optimizer, NoOptimizer) and kernel == "numba":
        return "reference"  # which only looks up and merges: others make the update
    why_not = triton.cannot(dtype, width, device) if kernel == "triton" else cpu.cannot(dtype, device)
    if wanted == kernel and why_not:
        raise ConfigError(f"kernel={kernel!r} cannot serve {rows:,} x {width} {dtype} with {optimizer.describe()}: {why_not}")
    reason = f" ({kernel}: {why_not})" if why_not and wanted == "auto" else ""
    if wanted == "reference" or why_not:
        kernel = "reference"
    log.info("slab of %s x %d %s, %s: kernel %s%s", f"{rows:,}", width, dtype, optimizer.describe(), kernel, reason)
    return kernel
