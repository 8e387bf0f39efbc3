"""Our own GPU kernels, in Triton: lookup, merge and update of one slab.

    lookup    gather + sum of each segment's rows, in one pass                                        lookup.py
    order     sort of the entries by row: where each row's duplicates are; needs no gradient         order.py
    merge     sums of each row's gradients, in the order of arrival                                   merge.py, sums.py
    update    the same sums and the optimizer's step on them, in one pass over weights and state      update.py, formulas.py

Nothing is summed by atomic additions, so results are the same bits every time. A row's gradients are summed by one program, in
the order of arrival, unless there are many (`order.direct_of`): then by several, in pieces whose bounds depend on their number and
the width only.
No call but `merge`, whose result has as many rows as there are, waits for the device: grids are bounded by what the host knows.

An optimizer that they have stands in `formulas.FORMULAS`. This file imports no Triton, which may be absent.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache

import torch

from shardembed.kernels.kernel import Kernel, SlabData, SlabFacts, lacks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_WIDTH = 4096  # a whole row lies in the registers of one program


def cannot(facts: SlabFacts) -> str | None:
    """Why these kernels do not serve such a slab, or None when they do."""
    if facts.dtype not in DTYPES:
        return f"its kernels have no {facts.dtype}"
    if not 1 <= facts.width <= MAX_WIDTH:
        return f"its kernels are for 1 to {MAX_WIDTH:,} columns"
    if facts.dynamic and facts.rounds_at_random:
        return "its noise knows rows by their number, and rows of a dynamic table have ids"
    if (why := missing()) is not None:
        return why
    here = facts.device.type
    if here != "cuda" and not (here == "cpu" and importlib.import_module("triton").knobs.runtime.interpret):
        return f"its kernels run on CUDA devices, not on {here}; on the CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    return lacks(importlib.import_module("shardembed.kernels.triton.formulas").FORMULAS, facts.optimizer)


def missing() -> str | None:
    """Why there are no kernels of Triton's here, or None when there are."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return f"triton does not load here: {error}"
    return None


@cache
def serves(device: torch.device) -> bool:
    """Whether what is no slab's goes through kernels of Triton's, for tensors on `device`: routes, messages, the order of rows."""
    return device.type == "cuda" and missing() is None


def make(data: SlabData) -> Kernel:
    """The kernel of a slab that it serves."""
    from shardembed.kernels.triton.kernel import TritonKernel

    return TritonKernel(data)
