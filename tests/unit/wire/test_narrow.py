"""Rows in 8 bits: what they become, and what they cannot."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.wire.narrow import decode, encode, row_bytes

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(st.integers(1, 9).flatmap(lambda width: st.lists(st.lists(FINITE, min_size=width, max_size=width), min_size=1, max_size=5)))
def test_an_element_is_off_by_a_254th_of_its_rows_largest(rows: list[list[float]]) -> None:
    given_SW = torch.tensor(rows).reshape(len(rows), -1)
    coded = encode(given_SW)
    assert coded.shape == (len(rows), row_bytes(given_SW.shape[1], torch.int8))
    found = decode(coded, torch.float64)
    largest = given_SW.abs().amax(1, keepdim=True) if given_SW.numel() else given_SW.new_zeros(len(rows), 1)
    # Subnormal scales have few bits of their own.
    assert bool(((found - given_SW).abs() <= largest.double() / 253 + 1e-36).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_seen_at_the_other_end(bad: float) -> None:
    found = decode(encode(torch.tensor([[1.0, bad], [1.0, 2.0], [0.0, 0.0]])), torch.float32)
    assert found[0].isnan().all()
    assert found[1:].isfinite().all()
    assert torch.equal(found[2], torch.zeros(2))


def test_float64_and_nothing_at_all() -> None:
    assert decode(encode(torch.ones(2, 3, dtype=torch.float64)), torch.float64).dtype == torch.float64
    assert decode(encode(torch.empty(0, 3)), torch.float32).shape == (0, 3)
