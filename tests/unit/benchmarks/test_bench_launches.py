"""Launches are counted as a GPU would make them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.launches import Launches
from shardembed.kernels.grouping import stable_order
from shardembed.kernels.triton.lookup import lookup

ONES = torch.ones(3, 4)
WHOLE = torch.arange(3)


def test_views_and_memory_are_free_and_what_computes_is_not() -> None:
    with Launches() as counted:
        part = torch.empty_like(ONES).view(-1).split([4, 8])[1].detach().unsqueeze(0)
        assert counted.operators == 0
        part.fill_(1)
        assert torch.add(part, part).shape == (1, 8)
    assert (counted.operators, counted.host_syncs) == (2, 0)
    torch.ones(3)
    assert counted.operators == 2, "outside"


def test_a_backward_counts() -> None:
    vector = torch.ones(3, requires_grad=True)
    with Launches() as counted:
        vector.exp().backward(torch.ones(3))
    assert {site.name for site in counted.plain} >= {"exp", "mul"}


@pytest.mark.parametrize(
    ("waits", "what"),
    [
        (1, lambda: bool(ONES[0, 0])),
        (1, lambda: WHOLE[WHOLE > 1]),
        (1, lambda: WHOLE.nonzero()),
        (1, lambda: torch.unique(WHOLE)),
        (2, lambda: torch.bincount(WHOLE)),
        (1, lambda: torch.repeat_interleave(WHOLE)),
        (0, lambda: torch.repeat_interleave(WHOLE, output_size=3)),
        (0, lambda: ONES[WHOLE]),
        (1, lambda: WHOLE.tolist()),
        (1, lambda: WHOLE.numpy()),
        (1, lambda: WHOLE.cpu().numpy()),
        (1, lambda: torch.from_numpy(np.ones(3))),
        (1, lambda: torch.tensor([1, 2])),
        (1, lambda: WHOLE.new_tensor([1])),
    ],
)
def test_where_the_host_waits(waits: int, what: object) -> None:
    with Launches() as counted:
        what()  # type: ignore[operator]
    assert counted.host_syncs == waits
    assert counted.operators >= 1


def test_a_kernel_is_one_call_whatever_the_interpreter_does() -> None:
    with Launches() as counted:
        lookup(ONES, WHOLE, None, torch.float32)
    assert (counted.operators, counted.compiled.total()) == (1, 1)
    assert [site.place.partition(":")[0] for site in counted.compiled] == ["kernels/triton/lookup.py"]


def test_a_place_is_the_line_that_asks() -> None:
    with Launches() as counted, counted.stage("route"):
        stable_order(WHOLE, 2**40)
    assert all(site.place.startswith("kernels/grouping.py:") and site.stage == "route" for site in counted.waits)
