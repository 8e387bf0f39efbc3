"""Stochastic rounding in the Triton update: the bits of `kernels/rounding.py`, whatever block a row lies in."""

from __future__ import annotations

import pytest
import torch

from shardembed.kernels import grouping, reference, rounding
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.rounding import Blocks, Origin
from shardembed.kernels.triton.update import update
from shardembed.optim import SGD, Adam, TableOptimizer
from tests.unit.kernels import triton_cases
from tests.unit.kernels.triton_cases import DEVICE, data_of, order_of, there

exact_roots = triton_cases.exact_roots
NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
# Not in order; of two tables; whole rows and strips, contiguous and strided; far beyond 32 bits.
ORIGINS = [
    Origin(first=5, table=-(2**62) - 12345, row=2**40, stride=1, column=7),
    Origin(first=0, table=0x1234_5678_9ABC_DEF, row=0, stride=1, column=0),
    Origin(first=12, table=-3, row=2, stride=3, column=64),
    Origin(first=13, table=-3, row=9, stride=3, column=0),
]
ROWS = 20


def origins_of(rows_U: torch.Tensor, blocks: list[Origin]) -> rounding.Origins:
    """As plain Python says."""
    found = []
    for row in rows_U.tolist():
        block = max((one for one in blocks if one.first <= row), key=lambda one: one.first)
        found.append((block.table, block.row + (row - block.first) * block.stride, block.column))
    return rounding.Origins(*torch.tensor(found, dtype=torch.int64).view(-1, 3).unbind(1))


def check(optimizer: TableOptimizer, weights: torch.Tensor, batches: list[Gradients], blocks: list[Origin]) -> None:
    """Train both, and compare bits; nan is nan."""
    rows = len(weights)
    plain = data_of(optimizer, weights.clone(), Blocks.of(blocks, torch.device("cpu")))
    fused = data_of(optimizer, weights.to(DEVICE, copy=True), Blocks.of(blocks, DEVICE))
    for step, waiting in enumerate(batches, start=3):
        rows_U, grads_UW = grouping.merge(waiting, rows)
        for name in ("tables_U", "rows_U", "columns_U"):
            assert plain.blocks is not None
            assert torch.equal(getattr(plain.blocks.of_rows(rows_U), name), getattr(origins_of(rows_U, blocks), name))
        reference.update(plain, rows_U, grads_UW, Step(0.1, step))
        made = there(waiting)
        update(fused, made, order_of(made, rows), 0.1, step)
        found, expected = fused.weights.cpu(), plain.weights
        same = (found.view(torch.int16) == expected.view(torch.int16)) | (found.isnan() & expected.isnan())
        assert same.all(), f"step {step}: {expected[~same][:4]} became {found[~same][:4]}"


@NARROW
@pytest.mark.parametrize("optimizer", [SGD(0.1), Adam(0.1)], ids=["SGD", "Adam"])
@pytest.mark.parametrize("blocks", [ORIGINS, ORIGINS[1:2]], ids=["blocks", "block"])
@pytest.mark.usefixtures("exact_roots")
def test_noise_is_that_of_the_reference(dtype: torch.dtype, optimizer: TableOptimizer, blocks: list[Origin]) -> None:
    torch.manual_seed(0)
    batches = [Gradients(torch.randint(0, ROWS, (30,)), torch.tensor([0, 9, 30]), torch.randn(2, 33)) for _ in range(2)]
    check(optimizer, torch.randn(ROWS, 33).to(dtype), batches, blocks)


@NARROW
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # of numpy, which Triton's interpreter computes with
def test_the_smallest_and_the_largest_numbers_are_rounded_alike(dtype: torch.dtype) -> None:
    """Below the normal numbers, at the end of the range and beyond it, infinity and nan."""
    torch.manual_seed(0)
    info = torch.finfo(dtype)
    spacing = info.max - float(torch.nextafter(torch.tensor(info.max, dtype=dtype), torch.tensor(0.0, dtype=dtype)))
    scales = [info.tiny / 64, info.tiny, info.tiny * 4, 2.0**-24, 1e-7, 1.0, info.max / 2]
    values = [scale * torch.randn(33) for scale in scales]
    values += [sign * (info.max + share * spacing * torch.rand(33)) for sign in (1, -1) for share in (0.5, 1.0)]
    values += [torch.full((33,), special) for special in (torch.inf, -torch.inf, torch.nan, 0.0, -0.0)]
    grads = torch.stack(values) * -1.0
    check(SGD(1.0), torch.zeros(len(grads), 33, dtype=dtype), [Gradients(torch.arange(len(grads)), None, grads * 10)], ORIGINS)
