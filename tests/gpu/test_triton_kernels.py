"""The Triton kernels on a GPU, at real sizes: compiled they do what they do in the interpreter, and wait for nothing.

The tests under `tests/unit/test_triton_*.py` run on the GPU too where there is one, with small tables.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.on_gpu.updates import SETTINGS
from shardembed.kernels import grouping, reference, rounding
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.rounding import Blocks, Origin
from shardembed.kernels.triton.lookup import lookup
from shardembed.kernels.triton.merge import merge
from shardembed.kernels.triton.order import order
from shardembed.kernels.triton.update import update
from shardembed.optim import SGD, Lion, RowwiseAdagrad, TableOptimizer
from tests.unit.kernels.triton_cases import DTYPES, OPTIMIZERS, compute_dtype, data_of

ROWS, BAGS = 200_000, 4096
EXACT = [replace(one, betas=SETTINGS[Lion].betas) if isinstance(one, Lion) else one for one in OPTIMIZERS]  # for whole numbers
SIZES = pytest.mark.parametrize(("width", "ids"), [(8, 100), (33, 30), (128, 10), (1000, 3)])


def skewed(entries: int) -> torch.Tensor:
    """Ids of which a few make up most."""
    return (ROWS ** torch.rand(entries, dtype=torch.float64) - 1).long().clamp_(0, ROWS - 1)


def bags(width: int, ids: int, dtype: torch.dtype, whole: bool = False) -> Gradients:
    grads = torch.randint(-9, 10, (BAGS, width)).to(dtype) if whole else torch.randn(BAGS, width, dtype=dtype)
    return Gradients(skewed(BAGS * ids).cuda(), torch.arange(0, BAGS * ids + 1, ids).cuda(), grads.cuda())


@SIZES
@pytest.mark.parametrize("dtype", DTYPES)
def test_lookups_are_within_rounding_of_float64(width: int, ids: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = torch.randn(ROWS, width).to(dtype).cuda()
    asked = bags(width, ids, torch.float32)
    found = lookup(weights, asked.rows_E, asked.offsets, compute_dtype(dtype))
    exact = reference.lookup(weights.double(), asked.rows_E, asked.offsets, torch.float64)
    sizes = reference.lookup(weights.double().abs(), asked.rows_E, asked.offsets, torch.float64)
    assert ((found - exact).abs() <= ids * torch.finfo(compute_dtype(dtype)).eps * sizes).all()
    assert torch.equal(lookup(weights, asked.rows_E, None, compute_dtype(dtype)), weights[asked.rows_E])


@SIZES
def test_merges_are_exact_and_the_same_again(width: int, ids: int) -> None:
    torch.manual_seed(0)
    waiting = bags(width, ids, torch.float32, whole=True)
    rows_U, sums = merge(waiting, order(waiting.rows_E, waiting.offsets, ROWS))
    wanted = grouping.merge(Gradients(waiting.rows_E, waiting.offsets, waiting.grads_SW.double()), ROWS)
    assert torch.equal(rows_U, wanted[0])
    assert torch.equal(sums.double(), wanted[1])
    waiting = bags(width, ids, torch.float32)
    made = order(waiting.rows_E, waiting.offsets, ROWS)
    assert torch.equal(merge(waiting, made)[1], merge(waiting, made)[1])


@SIZES
@pytest.mark.parametrize("optimizer", EXACT, ids=lambda one: type(one).__name__)
def test_updates_are_within_rounding_of_float64(optimizer: TableOptimizer, width: int, ids: int) -> None:
    torch.manual_seed(0)
    start = torch.randn(ROWS, width).cuda()
    found, exact = data_of(optimizer, start.clone()), data_of(optimizer, start.double())
    for step in (1, 2):
        waiting = bags(width, ids, torch.float32, whole=True)  # sums are exact, so what differs is the formula
        update(found, waiting, order(waiting.rows_E, waiting.offsets, ROWS), 0.1, step)
        wide = Gradients(waiting.rows_E, waiting.offsets, waiting.grads_SW.double())
        reference.update(exact, *grouping.merge(wide, ROWS), Step(0.1, step))
    torch.testing.assert_close(found.weights.double(), exact.weights, rtol=1e-4, atol=1e-4)
    for name, one in found.state.items():
        torch.testing.assert_close(one.double(), exact.state[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("optimizer", [one for one in OPTIMIZERS if one.rowwise], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("width", [16, 32, 64, 100, 128, 256, 512, 1024])
@pytest.mark.parametrize("given", [True, False])
def test_no_thread_reads_a_number_of_a_row_that_another_has_stored(optimizer: TableOptimizer, width: int, given: bool) -> None:
    """So many rows that threads drift apart. A number that is read late counts twice, which moves the row by far more than that."""
    rows = min(1_000_000, 200_000_000 // width)
    for seed in range(3):
        torch.manual_seed(seed)
        ids, grads = torch.randint(rows, (rows,), device="cuda"), torch.randn(rows, width, device="cuda")
        waiting = Gradients(ids, None, grads)
        rows_U, sums_UW = grouping.merge(waiting, rows)
        square_U = sums_UW.square().mean(1) if given else None
        start = torch.randn(rows, width, device="cuda")
        found, plain = data_of(optimizer, start.clone()), data_of(optimizer, start)
        update(found, waiting, order(ids, None, rows), 0.1, 1, 1.0, square_U)
        reference.update(plain, rows_U, sums_UW, Step(0.1, 1, square_U))
        wrong = ((found.weights - plain.weights).abs() > 1e-4).any(1).sum()
        assert wrong == 0, f"{wrong} of {len(rows_U)} rows"
        for name, one in found.state.items():
            torch.testing.assert_close(one, plain.state[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_rounding_has_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    start, waiting = torch.randn(ROWS, 64).to(dtype), bags(64, 10, torch.float32, whole=True)
    found = start.cuda()
    blocks = Blocks.of([Origin(first=0, table=-(2**61), row=17, stride=3, column=5)], found.device)
    made = order(waiting.rows_E, waiting.offsets, ROWS)
    update(data_of(SGD(0.125), found, blocks), waiting, made, 0.125, 7)
    rows_U, grads_UW = (one.cpu() for one in merge(waiting, made))
    origins = rounding.Origins(torch.full_like(rows_U, -(2**61)), 17 + 3 * rows_U, torch.full_like(rows_U, 5))
    start[rows_U] = rounding.stochastic(start[rows_U].float() - 0.125 * grads_UW, dtype, origins, 7)
    assert torch.equal(found.cpu().view(torch.int16), start.view(torch.int16))


def test_nothing_waits_for_the_device_but_merge() -> None:
    data, waiting = data_of(RowwiseAdagrad(0.1), torch.randn(ROWS, 16).cuda()), bags(16, 10, torch.float32)

    def all_of_it() -> None:
        lookup(data.weights, waiting.rows_E, waiting.offsets, torch.float32)
        made = order(waiting.rows_E, waiting.offsets, ROWS)
        update(data, waiting, made, 0.1, 1, factor=0.5)

    all_of_it()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        all_of_it()
    finally:
        torch.cuda.set_sync_debug_mode(before)
