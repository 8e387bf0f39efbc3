"""The adjoint of plain sums and means, written as a lookup, against torch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shardembed.journey.route.combine import _Pool

WIDTH = 3


@st.composite
def bags(draw: st.DrawFn) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many vectors there are, the one that each id reads, and where each bag begins; bags may be empty, also the last."""
    count = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    segments = draw(st.lists(st.integers(0, count - 1), min_size=sum(lengths), max_size=sum(lengths)))
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return count, torch.tensor(segments, dtype=torch.int64), starts


@pytest.mark.parametrize("mode", ["sum", "mean"])
@given(bags())
def test_pooling_has_torchs_output_and_gradient(mode: str, drawn: Any) -> None:
    count, segments, starts = drawn
    torch.manual_seed(0)
    vectors = torch.randn(count, WIDTH, dtype=torch.float64)
    ours, theirs = (vectors.clone().requires_grad_() for _ in range(2))
    found = _Pool.apply(ours, segments, starts, mode)
    expected = F.embedding_bag(segments, theirs, starts, mode=mode)
    assert torch.equal(found, expected)
    slopes = torch.randn_like(expected)
    found.backward(slopes)
    expected.backward(slopes)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
