"""What a step copies between host and device is there when it is read."""

from __future__ import annotations

import numpy as np
import torch

from shardembed.kernels.host import to_device, to_host


def test_what_lands_on_the_host_is_there() -> None:
    device = torch.device("cuda")
    busy = torch.ones(4000, 4000, device=device)
    numbers = np.arange(100_000)
    there = to_device(numbers, device)
    for _ in range(20):
        busy = (busy @ busy).clamp_(max=1.0)
    doubled = there * busy[0, 0].long() * 2
    assert np.array_equal(to_host(doubled), 2 * numbers)
