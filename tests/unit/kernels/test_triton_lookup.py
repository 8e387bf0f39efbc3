"""The Triton kernel that gathers and sums, against plain torch: to the last bit, where the order of the sums is the same."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from shardembed.kernels import reference
from shardembed.kernels.triton.lookup import lookup
from tests.amount import sampled
from tests.unit.kernels.triton_cases import DEVICE, DTYPES, WIDTHS, compute_dtype

ROWS = 20
LENGTHS = [3, 0, 9, 1]  # none, and more than one unrolled turn of the loop
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


def found(weights: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor | None) -> torch.Tensor:
    there = None if offsets is None else offsets.to(DEVICE)
    return lookup(weights.to(DEVICE), rows.to(DEVICE), there, compute_dtype(weights.dtype)).cpu()


@pytest.mark.parametrize(("width", "dtype"), sampled(product(WIDTHS, DTYPES)), ids=str)
def test_rows_and_sums_of_rows_are_torchs(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    weights, rows = torch.randn(ROWS, width).to(dtype), torch.randint(0, ROWS, (int(OFFSETS[-1]),))
    for offsets in (None, OFFSETS):
        wanted = reference.lookup(weights, rows, offsets, compute_dtype(dtype))
        got = found(weights, rows, offsets)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, which Triton's interpreter computes with
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_number_is_read_as_what_it_is(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(16, 4096)
    sums = found(values, torch.arange(16), torch.arange(17))
    assert torch.equal(sums.nan_to_num(nan=7.0), values.float().nan_to_num(nan=7.0))


@pytest.mark.parametrize(("width", "dtype"), sampled(product([1, 33, 128], DTYPES)), ids=str)
def test_entries_may_be_weighted(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    weights, rows = torch.randn(ROWS, width).to(dtype), torch.randint(0, ROWS, (int(OFFSETS[-1]),))
    compute = compute_dtype(dtype)
    scales = torch.randn(len(rows), dtype=compute)
    sums = lookup(weights.to(DEVICE), rows.to(DEVICE), OFFSETS.to(DEVICE), compute, scales.to(DEVICE)).cpu()
    wide = weights.to(torch.float64)
    wanted = F.embedding_bag(rows, wide, OFFSETS, mode="sum", per_sample_weights=scales.double(), include_last_offset=True)
    sizes = F.embedding_bag(
        rows, wide.abs(), OFFSETS, mode="sum", per_sample_weights=scales.double().abs(), include_last_offset=True
    )
    assert sums.dtype == compute
    assert ((sums - wanted).abs() <= (max(LENGTHS) + 1) * torch.finfo(compute).eps * sizes).all()
    singles = lookup(weights.to(DEVICE), rows.to(DEVICE), None, compute, scales.to(DEVICE)).cpu()
    assert torch.equal(singles, weights.to(compute)[rows] * scales.unsqueeze(1))


@pytest.mark.parametrize("width", [3, 128])
def test_nothing_asked_for_is_nothing_found(width: int) -> None:
    weights, none = torch.randn(ROWS, width), torch.empty(0, dtype=torch.int64)
    assert found(weights, none, None).shape == (0, width)
    assert found(weights, none, torch.zeros(1, dtype=torch.int64)).shape == (0, width)
    empty_bags = found(weights, none, torch.zeros(6, dtype=torch.int64))
    assert torch.equal(empty_bags, torch.zeros(5, width))


def test_rows_beyond_32_bits_of_elements() -> None:
    width = 64
    weights = torch.empty(2**31 // width + 8, width, dtype=torch.float16, device=DEVICE)  # only what is touched takes memory
    last = len(weights) - torch.tensor([1, 8, 1])
    weights[-8:] = torch.arange(8 * width, device=DEVICE).view(8, width)
    for offsets in (None, torch.tensor([0, 2, 3], device=DEVICE)):
        got = lookup(weights, last.to(DEVICE), offsets, torch.float32)
        kept = weights[-8:].cpu()
        wanted = kept[[7, 0, 7]] if offsets is None else torch.stack([kept[7].float() + kept[0].float(), kept[7].float()])
        assert torch.equal(got.cpu(), wanted)
