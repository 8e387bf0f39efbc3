"""Between host and device: the copies that a step makes of small arrays go through here, so that they can be counted.

A copy to the device is pinned and asynchronous, and nobody waits for it. A copy to the host waits for all that the device was asked
before, so a step can afford very few.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray


def to_device(numbers: NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array as a tensor there; on a CPU the two share their memory."""
    there = torch.from_numpy(numbers)
    if device.type == "cpu":
        return there
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)


def to_host(tensor: torch.Tensor) -> NDArray[Any]:
    """The tensor as an array. Host sync on a GPU: with what the current stream was asked before, and with no other."""
    if tensor.device.type != "cuda":
        return tensor.cpu().numpy()
    landed = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # of a cache: pinned anew it would cost far more
    landed.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return landed.numpy()
