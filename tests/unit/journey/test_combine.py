"""The adjoint of plain sums over a divisor, written as a lookup, against autograd's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.journey.route.combine import _Pool
from shardembed.tables.pooling import POOLINGS, PoolingKind
from tests.oracle import lookup

WIDTH = 3


@st.composite
def bags(draw: st.DrawFn) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many vectors there are, the one that each id reads, and where each bag begins; bags may be empty, also the last."""
    count = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    segments = draw(st.lists(st.integers(0, count - 1), min_size=sum(lengths), max_size=sum(lengths)))
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return count, torch.tensor(segments, dtype=torch.int64), starts


@pytest.mark.parametrize("kind", [kind for kind in POOLINGS.values() if kind.partial_sums], ids=lambda kind: kind.name)
@given(bags())
def test_pooling_has_the_oracles_output_and_gradient(kind: PoolingKind, drawn: Any) -> None:
    count, segments, starts = drawn
    torch.manual_seed(0)
    vectors = torch.randn(count, WIDTH, dtype=torch.float64)
    ours, theirs = (vectors.clone().requires_grad_() for _ in range(2))
    found = _Pool.apply(ours, segments, starts, kind, False, None)
    expected = lookup(theirs, kind.name, segments, torch.cat([starts, torch.tensor([len(segments)])]), None)
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if kind.name == kind.over_ids else 1e-14)  # torch's own: to the bit
    slopes = torch.randn_like(expected)
    found.backward(slopes)
    expected.backward(slopes)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
