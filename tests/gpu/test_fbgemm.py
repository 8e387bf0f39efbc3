"""FBGEMM's kernels for GPUs, every optimizer that it has there, against the reference."""

from __future__ import annotations

import pytest
import torch

from benchmarks.on_gpu import updates
from benchmarks.on_gpu.check import Here
from shardembed.kernels import fbgemm


def test_lookups_and_steps_are_the_references() -> None:
    if (why := fbgemm.missing("cuda")) is not None:
        pytest.skip(why)
    assert list(updates.fbgemm(Here(torch.device("cuda", 0), torch.cuda.device_count())))
