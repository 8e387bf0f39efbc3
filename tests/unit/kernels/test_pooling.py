"""The way back through pooling: compiled, in plain torch, and as torch's own autograd has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels import grouping
from shardembed.kernels.pooling import spread


@given(st.data(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([1, 3, 8, 33]), st.booleans())
def test_the_kernel_has_the_bits_of_plain_torch(data: st.DataObject, dtype: torch.dtype, width: int, once: bool) -> None:
    lengths = data.draw(st.lists(st.integers(0, 4), max_size=8))
    count = data.draw(st.integers(1, 6)) + (sum(lengths) if once else 0)
    numbers = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    segments_N = torch.randint(0, count, (sum(lengths),), generator=numbers)
    if once:
        segments_N = torch.randperm(count, generator=numbers)[: sum(lengths)]
    starts_B = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    grads_BW = torch.randn(len(lengths), width, generator=numbers, dtype=dtype)
    found = spread(segments_N, starts_B, grads_BW, count, once)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        twin = spread(segments_N, starts_B, grads_BW, count, once)
    assert found.dtype == twin.dtype == dtype
    assert torch.equal(found, twin)
    vectors_SW = torch.zeros(count, width, dtype=dtype, requires_grad=True)
    F.embedding_bag(segments_N, vectors_SW, starts_B, mode="sum").backward(grads_BW)
    torch.testing.assert_close(found, vectors_SW.grad, rtol=1e-5, atol=1e-5)


def test_gradients_that_are_not_contiguous_are_taken_as_they_read() -> None:
    grads_BW = torch.ones(1, 1).expand(2, 3)
    found = spread(torch.tensor([1, 0, 1]), torch.tensor([0, 2]), grads_BW, 3)
    assert found.tolist() == [[1.0] * 3, [2.0] * 3, [0.0] * 3]
