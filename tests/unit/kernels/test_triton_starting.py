"""Starting numbers by Triton, and by plain torch on the same device: the bits of the CPU's, whatever the width and the columns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels.starting import Distribution, plain
from shardembed.kernels.triton.starting import draw
from tests.unit.kernels.triton_cases import DEVICE

INT64 = st.sampled_from([0, 1, -1, -2, 2**63 - 1, -(2**63)]) | st.integers(-(2**63), 2**63 - 1)


def check(ids: torch.Tensor, columns: range, numbers: Distribution) -> None:
    expected = plain(ids, columns, numbers).view(torch.int32)
    there = torch.full((ids.numel(), len(columns)), torch.nan, device=DEVICE)
    draw(there, ids.to(DEVICE), columns.start, numbers)
    for found in (there, plain(ids.to(DEVICE), columns, numbers)):
        assert torch.equal(found.cpu().view(torch.int32), expected)


@given(
    st.lists(INT64, max_size=9),
    INT64,
    st.booleans(),
    st.floats(-10, 10, width=32),
    st.floats(-10, 10, width=32),
    st.integers(0, 5),
    st.integers(0, 40),
)
def test_every_element_has_the_bits_of_the_cpu(
    ids: list[int], table: int, normal: bool, scale: float, offset: float, first: int, width: int
) -> None:
    check(torch.tensor(ids, dtype=torch.int64), range(first, first + width), Distribution(table, normal, scale, offset))


@pytest.mark.parametrize("normal", [False, True], ids=["uniform", "normal"])
def test_many_programs_draw_what_one_would(normal: bool) -> None:
    """Also where a product and a sum that were fused would often come out otherwise."""
    ids = torch.randint(-(2**63), 2**63 - 1, (3000,), generator=torch.Generator().manual_seed(0))
    numbers = Distribution(-(2**62), normal, float(torch.tensor(0.7)), float(torch.tensor(-0.3)))
    check(ids, range(3, 36), numbers)
    x = plain(ids, range(3, 36), Distribution(-(2**62), normal, 1.0, 0.0)).double()
    fused = (x * torch.tensor(0.7).double() + torch.tensor(-0.3).double()).float()
    assert (fused != plain(ids, range(3, 36), numbers)).any(), "the numbers can tell the two apart"
