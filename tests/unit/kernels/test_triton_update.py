"""Merge and update in Triton against the reference: the same bits, but for a mean over columns, whose order of sums differs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from shardembed.kernels.gradients import Gradients
from shardembed.kernels.triton import tiles
from shardembed.kernels.triton.order import DIRECT
from shardembed.optim import FTRL, SGD, TableOptimizer
from tests.amount import sampled
from tests.unit.kernels import triton_cases
from tests.unit.kernels.triton_cases import DTYPES, OPTIMIZERS, WIDTHS, Pair, compute_dtype, gradients

exact_roots = triton_cases.exact_roots
ROWS = 8


def told(value: object) -> str:
    return type(value).__name__ if isinstance(value, TableOptimizer) else str(value)


KINDS = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=told)


def bags(width: int, dtype: torch.dtype) -> Gradients:
    """Duplicates within a segment and across."""
    return gradients(ROWS, [3, 0, 14, 1, 9], 5, width, dtype, whole=False)


def batches(width: int, dtype: torch.dtype) -> list[Gradients]:
    """Also nothing at all, and single rows."""
    return [bags(width, dtype), *(gradients(ROWS, None, count, width, dtype, whole=False) for count in (0, 30))]


def check(pair: Pair) -> None:
    """Bits, but where squares are summed over columns in another order."""
    if not pair.optimizer.rowwise:
        pair.check_bits()
        return
    for name, fused, plain in pair.compared():
        eps = torch.finfo(plain.dtype).eps
        torch.testing.assert_close(fused, plain, rtol=8 * eps, atol=8 * eps, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("optimizer", "dtype"), sampled(product(OPTIMIZERS, DTYPES)), ids=told)
@pytest.mark.usefixtures("exact_roots")
def test_updates_are_the_references(optimizer: TableOptimizer, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pair = Pair(optimizer, torch.randn(ROWS, 3).to(dtype))
    for number, waiting in enumerate(batches(3, compute_dtype(dtype)), start=1):
        pair.step(waiting, number, lr=0.1 / number)  # schedules change it between steps
    check(pair)


@pytest.mark.parametrize(("optimizer", "width"), sampled(product(OPTIMIZERS, WIDTHS)), ids=told)
@pytest.mark.usefixtures("exact_roots")
def test_tables_of_every_width_are_updated(optimizer: TableOptimizer, width: int) -> None:
    torch.manual_seed(width)
    dtype = DTYPES[(WIDTHS.index(width) + OPTIMIZERS.index(optimizer)) % len(DTYPES)]
    pair = Pair(optimizer, torch.randn(ROWS, width).to(dtype))
    pair.step(bags(width, compute_dtype(dtype)), 2)
    check(pair)


@pytest.mark.usefixtures("exact_roots")
def test_one_program_goes_from_tile_to_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WAVES", 0)
    assert tiles.Tile.of(512).lasting_programs(ROWS, triton_cases.DEVICE) == 1
    torch.manual_seed(0)
    pair = Pair(OPTIMIZERS[1], torch.randn(ROWS, 512))
    pair.step(bags(512, torch.float32), 1)
    pair.step(gradients(2, None, 3 * DIRECT, 512, torch.float32, whole=True), 2)
    check(pair)


@pytest.mark.parametrize("optimizer", [one for one in OPTIMIZERS if one.rowwise], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("exact_roots")
def test_a_given_mean_square_is_used(optimizer: TableOptimizer, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    pair = Pair(optimizer, torch.randn(ROWS, width).to(dtype))
    for number, waiting in enumerate(batches(width, compute_dtype(dtype)), start=1):
        square_U = torch.rand(len(waiting.rows_E.unique()), dtype=compute_dtype(dtype))
        pair.step(waiting, number, square_U=square_U)
    pair.check_bits()


@KINDS
@pytest.mark.usefixtures("exact_roots")
def test_gradients_are_multiplied_after_they_are_summed(optimizer: TableOptimizer) -> None:
    torch.manual_seed(0)
    pair = Pair(optimizer, torch.randn(ROWS, 2))  # so narrow that a mean of squares has one order only
    for number, waiting in enumerate(batches(2, torch.float32), start=1):
        pair.step(waiting, number, factor=1 / 3)
    pair.check_bits()


@pytest.mark.usefixtures("exact_roots")
def test_hot_rows_are_summed_in_pieces_first() -> None:
    torch.manual_seed(0)
    pair = Pair(FTRL(0.1), torch.randn(3, 5))
    for number in (1, 2):
        pair.step(gradients(3, None, 300, 5, torch.float32, whole=True), number)
    pair.check_bits()


def test_float32_stays_within_rounding_of_float64() -> None:
    for optimizer in OPTIMIZERS:
        torch.manual_seed(0)
        weights = torch.randn(ROWS, 48)
        narrow, wide = Pair(optimizer, weights), Pair(optimizer, weights.double())
        for number, waiting in enumerate(batches(48, torch.float32), start=1):
            narrow.step(waiting, number)
            wide.step(Gradients(waiting.rows_E, waiting.offsets, waiting.grads_SW.double()), number)
        error = (narrow.fused.weights.double() - wide.plain.weights.to(narrow.fused.weights.device)).abs().max()
        assert error < 1e-5, f"{optimizer.describe()}: off by {error}"


@KINDS
def test_rows_that_do_not_occur_do_not_move(optimizer: TableOptimizer) -> None:
    torch.manual_seed(0)
    weights = torch.randn(ROWS, 6)
    pair = Pair(optimizer, weights)
    pair.step(gradients(ROWS // 2, [5, 40], 2, 6, torch.float32, whole=False), 1)
    for name, fused, _ in pair.compared():
        before = weights if name == "weights" else torch.zeros_like(fused)
        assert torch.equal(fused[ROWS // 2 :], before[ROWS // 2 :])
        assert not torch.equal(fused[: ROWS // 2], before[: ROWS // 2])


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, which Triton's interpreter computes with
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_narrow_number_is_written_as_what_it_is(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(16, 4096)
    pair = Pair(SGD(0.1), values)
    pair.step(Gradients(torch.arange(16), None, torch.zeros(16, 4096)), 1)
    assert torch.equal(pair.fused.weights.cpu().float().nan_to_num(nan=7.0), values.float().nan_to_num(nan=7.0))
