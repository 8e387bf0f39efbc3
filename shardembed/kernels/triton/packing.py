"""Tensors into a message, and out of one: all parts and ranks in one pass, whatever their number.

The tensors are known by their addresses, so that none has to be put beside another first. Which chunk of the message a unit lies in
is found by binary search.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from shardembed.kernels.host import to_device
from shardembed.kernels.triton.search import halvings, not_above
from shardembed.kernels.triton.tiles import launch
from shardembed.wire.message import MessageLayout, aligned

UNITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # what is moved, by its bytes
BLOCK = 1024


def move(tensors: Sequence[torch.Tensor], layout: MessageLayout, buffer: torch.Tensor, pack: bool) -> None:
    """From the tensors of a message, contiguous ones, to its bytes (`pack`), or back."""
    item_bytes = layout.schema.item_bytes
    addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    travel = layout.sizes.T.reshape(-1)  # in the order of the message
    unit = int(np.gcd.reduce(np.concatenate([item_bytes, addresses]), initial=max(UNITS)))
    before = np.cumsum(layout.items * item_bytes[:, None], 1) - layout.items * item_bytes[:, None]
    here = (before + addresses[:, None]).T.reshape(-1)
    there = np.cumsum(aligned(travel)) - aligned(travel)
    some = travel > 0
    ends = np.cumsum(travel[some])
    begins = ends - travel[some]
    count, units = len(ends), int(ends[-1]) // unit if len(ends) else 0
    if not units:
        return
    chunks = to_device(np.stack([begins // unit, here[some] - begins, (there[some] - begins) // unit]), buffer.device)
    launch(
        _move,
        -(-units // BLOCK),
        buffer.view(UNITS[unit]),
        chunks,
        count,
        units,
        halvings(count),
        UNIT=unit,
        PACK=pack,
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["count", "units", "halvings"])
def _move(message, chunks, count, units, halvings, UNIT: tl.constexpr, PACK: tl.constexpr, BLOCK: tl.constexpr):
    """chunks: of each the unit that it begins at, and what makes an address of a unit's bytes, and its place in the message."""
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = unit < units
    chunk = not_above(chunks, 0, count, unit, live, halvings) - 1
    address = tl.load(chunks + count + chunk, mask=live, other=0) + unit * UNIT
    here = address.to(tl.pointer_type(message.dtype.element_ty))
    there = message + tl.load(chunks + 2 * count + chunk, mask=live, other=0) + unit
    if PACK:
        tl.store(there, tl.load(here, mask=live), mask=live)
    else:
        tl.store(here, tl.load(there, mask=live), mask=live)
