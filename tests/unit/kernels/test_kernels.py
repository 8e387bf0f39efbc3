"""The reference kernels against dictionaries, and the compiled ones against the reference."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.errors import ConfigError
from shardembed.kernels import cpu, grouping, reference
from shardembed.kernels.choose import choose
from shardembed.kernels.cpu import NumbaKernel
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import Kernel, SlabData, SlabFacts
from shardembed.kernels.reference import ReferenceKernel
from shardembed.optim import FTRL, SGD, Adagrad, TableOptimizer
from tests.oracle import EXAMPLES

CPU = torch.device("cpu")
ROWS, WIDTH = 6, 3


@st.composite
def gradients(draw: st.DrawFn, rows: int = ROWS, bags: bool | None = None) -> Gradients:
    """Whole-numbered gradients, so that sums are exact in any order."""
    lengths = draw(st.lists(st.integers(1, 4), max_size=6))
    bags = draw(st.booleans()) if bags is None else bags
    count = sum(lengths) if bags else len(lengths)
    rows_E = torch.tensor(draw(st.lists(st.integers(0, rows - 1), min_size=count, max_size=count)), dtype=torch.int64)
    numbers = draw(st.lists(st.integers(-9, 9), min_size=len(lengths) * WIDTH, max_size=len(lengths) * WIDTH))
    grads = torch.tensor(numbers, dtype=torch.float32).view(-1, WIDTH)
    return Gradients(rows_E, torch.tensor([0, *lengths]).cumsum(0) if bags else None, grads)


def summed(parts: list[Gradients]) -> dict[int, torch.Tensor]:
    total: dict[int, torch.Tensor] = {}
    for part in parts:
        offsets = range(len(part.rows_E) + 1) if part.offsets is None else part.offsets.tolist()
        for segment, (first, last) in enumerate(pairwise(offsets)):
            for row in part.rows_E[first:last].tolist():
                total[row] = total.get(row, torch.zeros(WIDTH)) + part.grads_SW[segment]
    return total


def check_merged(waiting: Gradients, parts: list[Gradients]) -> None:
    rows, grads = grouping.merge(waiting, ROWS)
    again = grouping.merge(waiting, 2**40)  # as in a slab whose rows do not fit 32 bits
    assert torch.equal(rows, again[0])
    assert torch.equal(grads, again[1])
    wanted = summed(parts)
    assert rows.tolist() == sorted(wanted)
    assert grads.shape == (len(wanted), WIDTH)
    for row, grad in zip(rows.tolist(), grads, strict=True):
        assert torch.equal(grad, wanted[row])


@given(gradients())
def test_merge_sums_a_rows_gradients(waiting: Gradients) -> None:
    check_merged(waiting, [waiting])


@given(st.lists(gradients(), min_size=1, max_size=4))
def test_join_mixes_bags_and_single_rows(parts: list[Gradients]) -> None:
    joined = Gradients.join(parts)
    assert (joined.offsets is None) == all(part.offsets is None for part in parts)
    check_merged(joined, parts)


def test_merge_gives_the_same_bits_again() -> None:
    torch.manual_seed(0)
    waiting = Gradients(torch.randint(0, 5, (500,)), None, torch.randn(500, WIDTH))
    assert torch.equal(grouping.merge(waiting, 5)[1], grouping.merge(waiting, 5)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lookup(dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.randint(-9, 9, (7, WIDTH)).to(dtype)
    rows, offsets = torch.tensor([6, 0, 0, 3]), torch.tensor([0, 3, 4])
    singles = reference.lookup(weights, rows, None, compute)
    assert singles.dtype == dtype
    assert torch.equal(singles, weights[rows])
    sums = reference.lookup(weights, rows, offsets, compute)
    assert sums.dtype == compute
    assert torch.equal(sums, torch.stack([weights[6] + 2 * weights[0], weights[3]]).to(compute))
    nothing = reference.lookup(weights, rows[:0], offsets[:1], compute)
    assert nothing.shape == (0, WIDTH)


def test_lookup_sums_in_the_wider_dtype() -> None:
    weights = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)  # 256 + 1 has no place in bfloat16
    assert reference.lookup(weights, torch.tensor([0, 1]), torch.tensor([0, 2]), torch.float32).item() == 257


def data_of(optimizer: TableOptimizer, weights: torch.Tensor) -> SlabData:
    """A slab that has not learned yet, with these weights."""
    shapes = {"row": weights.shape[:1], "element": weights.shape}
    state = {name: torch.zeros(shapes[shape], dtype=weights.dtype) for name, shape in optimizer.state.items()}
    return SlabData(weights, state, optimizer, weights.dtype)


def facts(optimizer: TableOptimizer, dtype: torch.dtype, rows: int = 1000) -> SlabFacts:
    return SlabFacts(optimizer, dtype, 8, rows, CPU)


ALL = pytest.mark.parametrize("optimizer", EXAMPLES.values(), ids=EXAMPLES)
UPDATES = [*(one for one in EXAMPLES.values() if type(one) in cpu.FORMULAS), Adagrad(0.1, eps=0.5), FTRL(0.1)]


@pytest.mark.parametrize("optimizer", UPDATES, ids=lambda one: one.describe())
@pytest.mark.parametrize("width", [1, 3, 4, 16, 33, 128])
@pytest.mark.parametrize("bags", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiled_steps_are_the_references(optimizer: TableOptimizer, width: int, bags: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    rows = 20
    start = torch.randn(rows, width, dtype=dtype)
    fused, plain = NumbaKernel(data_of(optimizer, start.clone())), ReferenceKernel(data_of(optimizer, start.clone()))
    for step, segments in enumerate([40, 0, 7, 1], start=1):  # among them an empty batch
        lengths = torch.randint(1, 5, (segments,)) if bags else torch.ones(segments, dtype=torch.int64)
        rows_E = torch.randint(1, rows, (int(lengths.sum()),))
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]) if bags else None
        waiting = Gradients(rows_E, offsets, torch.randn(segments, width, dtype=dtype))
        lr = 0.1 / step  # schedules change it between steps
        fused.update(waiting, None, False, Step(lr, step), 0.5)
        plain.update(merged(plain, waiting), None, True, Step(lr, step), 0.5)
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(fused.data.weights, plain.data.weights, rtol=bound, atol=bound)
    for name, state in fused.data.state.items():
        torch.testing.assert_close(state, plain.data.state[name], rtol=bound, atol=bound)
    assert torch.equal(fused.data.weights[0], start[0])


@pytest.mark.parametrize("optimizer", UPDATES, ids=lambda one: one.describe())
@pytest.mark.parametrize("bags", [False, True])
def test_compiled_steps_sum_gradients_as_a_merge_does(optimizer: TableOptimizer, bags: bool) -> None:
    """To the bit: a row's gradients are added in the order of arrival, one by one."""
    torch.manual_seed(0)
    rows, segments = 5000, 2000  # enough to be sorted by long digits, in more than one pass
    lengths = torch.randint(1, 6, (segments,)) if bags else torch.ones(segments, dtype=torch.int64)
    count = int(lengths.sum())
    rows_E = (torch.rand(count).pow(4) * rows).long()  # popular rows among them
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]) if bags else None
    waiting, start = Gradients(rows_E, offsets, torch.randn(segments, 16)), torch.randn(rows, 16)
    at_once, apart = NumbaKernel(data_of(optimizer, start.clone())), NumbaKernel(data_of(optimizer, start.clone()))
    for step in (1, 2):
        at_once.update(waiting, None, False, Step(0.1, step), 0.5)
        apart.update(merged(apart, waiting), None, True, Step(0.1, step), 0.5)
    assert torch.equal(at_once.data.weights, apart.data.weights)
    for name, state in at_once.data.state.items():
        assert torch.equal(state, apart.data.state[name])


def merged(kernel: Kernel, waiting: Gradients) -> Gradients:
    rows_U, grads_UW = kernel.merge(waiting, None)
    return Gradients(rows_U, None, grads_UW)


@pytest.mark.parametrize("optimizer", [one for one in UPDATES if one.rowwise], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("width", [3, 16])
def test_compiled_updates_take_the_statistic_of_whole_rows(optimizer: TableOptimizer, width: int) -> None:
    torch.manual_seed(0)
    start, squares = torch.randn(9, width), torch.rand(5)
    waiting = Gradients(torch.tensor([1, 2, 5, 7, 8]), None, torch.randn(5, width))
    fused, plain = NumbaKernel(data_of(optimizer, start.clone())), ReferenceKernel(data_of(optimizer, start.clone()))
    for kernel in (fused, plain):
        kernel.update(waiting, None, True, Step(0.1, 1, squares), 1.0)
    torch.testing.assert_close(fused.data.weights, plain.data.weights)
    for name, state in fused.data.state.items():
        torch.testing.assert_close(state, plain.data.state[name])


@ALL
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_does_the_same_with_every_kernel(optimizer: TableOptimizer, bad: float) -> None:
    """And nan is seen: a row that stands still for good instead would be found by nobody."""
    grads = torch.tensor([[0.5, bad, -0.5], [0.25, -0.25, 1.0]])
    makes = (ReferenceKernel, NumbaKernel) if type(optimizer) in cpu.FORMULAS else (ReferenceKernel,)
    kernels: list[ReferenceKernel | NumbaKernel] = [make(data_of(optimizer, torch.ones(3, 3))) for make in makes]
    for step in (1, 2):  # then with the state that it left
        for kernel in kernels:
            given = grads if step == 1 else grads.nan_to_num(0.5, 0.5, 0.5)
            kernel.update(Gradients(torch.tensor([0, 2]), None, given.clone()), None, True, Step(0.1, step), 1.0)
    plain, *others = (kernel.data for kernel in kernels)
    assert plain.weights[0, 1].isnan() or not math.isnan(bad), "the weight of a gradient that was nan"
    assert plain.weights[2].isfinite().all()
    for compiled in others:
        torch.testing.assert_close(compiled.weights, plain.weights, equal_nan=True)
        for name, state in compiled.state.items():
            torch.testing.assert_close(state, plain.state[name], equal_nan=True)


@ALL
@pytest.mark.parametrize("make", [ReferenceKernel, NumbaKernel])
def test_an_update_without_rows_changes_nothing(make: Callable[[SlabData], Kernel], optimizer: TableOptimizer) -> None:
    if make is NumbaKernel and type(optimizer) not in cpu.FORMULAS:
        pytest.skip("which Numba's kernels do not have")
    data = data_of(optimizer, torch.ones(3, 2))
    kernel, nothing = make(data), Gradients(torch.empty(0, dtype=torch.int64), None, torch.empty(0, 2))
    for is_merged in (True, *([False] if kernel.fuses else [])):
        kernel.update(nothing, None, is_merged, Step(0.1, 1), 1.0)
    assert data.weights.eq(1).all()
    assert all(tensor.eq(0).all() for tensor in data.state.values())


@given(st.lists(st.integers(0, 2**50), max_size=30), st.integers(1, 60))
def test_grouping_is_torchs_own(numbers: list[int], bits: int) -> None:
    given = torch.tensor(numbers, dtype=torch.int64) % 2**bits
    groups = grouping.group(given, 2**bits)
    distinct, inverse, counts = torch.unique(given, return_inverse=True, return_counts=True)
    assert torch.equal(groups.numbers_U, distinct)
    assert torch.equal(groups.inverse(), inverse)
    assert torch.equal(groups.counts(), counts)
    assert torch.equal(groups.order_E, torch.argsort(given, stable=True))
    short = (given % 2**31).to(torch.int32)
    assert torch.equal(grouping.stable_order(short, 2**31), torch.argsort(short, stable=True))


def test_numbers_that_are_not_side_by_side_are_grouped_alike() -> None:
    numbers = torch.randint(0, 50, (200,), generator=torch.Generator().manual_seed(0))
    every_other = numbers[::2]
    assert torch.equal(grouping.stable_order(every_other, 50), torch.argsort(every_other, stable=True))
    assert torch.equal(grouping.group(every_other, 50).order_E, torch.argsort(every_other, stable=True))


def test_elements_of_arrays_that_are_not_contiguous_are_refused() -> None:
    """They are read by their place in memory."""
    numba = pytest.importorskip("numba")
    from shardembed.kernels.numba.elements import load, load_each

    first, of_each = numba.njit(lambda values: load(values, 1)), numba.njit(lambda values: load_each((values,), 1))
    assert first(np.arange(4)) == 1
    assert of_each(np.arange(4)) == (1,)
    for wrong in (np.arange(4)[::2], np.zeros((2, 2))):
        for read in (first, of_each):
            with pytest.raises(numba.TypingError, match="contiguous arrays of one dimension"):
                read(wrong)


def test_many_numbers_are_sorted_by_long_digits() -> None:
    numbers = torch.randint(0, 2**40, (10_000,), generator=torch.Generator().manual_seed(0)) % 3_000_000
    assert torch.equal(grouping.stable_order(numbers, 3_000_000), torch.argsort(numbers, stable=True))


@given(gradients())
def test_without_numba_the_same_comes_from_torch(waiting: Gradients) -> None:
    found = grouping.merge(waiting, ROWS), grouping.group(waiting.rows_E, ROWS).inverse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouping, "missing", lambda: "numba is not installed")
        again = grouping.merge(waiting, ROWS), grouping.group(waiting.rows_E, ROWS).inverse()
    for one, other in zip((*found[0], found[1]), (*again[0], again[1]), strict=True):
        assert torch.equal(one, other)


def test_compiled_kernels_are_chosen_where_they_serve(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="shardembed"):
        assert choose("auto", facts(Adagrad(), torch.float32)) == "numba"
    (said,) = caplog.messages
    assert said == "slab of 1,000 x 8 torch.float32, Adagrad(lr=0.01, eps=1e-10): kernel numba"
    assert choose("reference", facts(Adagrad(), torch.float32)) == "reference"


@ALL
def test_an_update_piece_by_piece_is_the_update(optimizer: TableOptimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for elements in (reference.PIECE_ELEMENTS, 3 * 4):
        monkeypatch.setattr(reference, "PIECE_ELEMENTS", elements)
        torch.manual_seed(0)
        data = data_of(optimizer, torch.randn(20, 4))
        squares = torch.rand(10) if optimizer.rowwise else None
        for step in (1, 2):
            rows = torch.randperm(20)[:10].sort().values
            reference.update(data, rows, torch.randn(10, 4), Step(0.1, step, squares))
        found.append([data.weights, *data.state.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_is_chosen_with_a_reason(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="shardembed"):
        assert choose("auto", facts(SGD(), dtype)) == "reference"
    assert f"kernel reference (numba: its kernels are for float32 and float64, not for {dtype})" in caplog.text
    with pytest.raises(ConfigError, match=r"kernel='numba' cannot serve 1,000 x 8 .*: its kernels are for float32"):
        choose("numba", facts(SGD(), dtype))


def test_a_machine_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouping.importlib.util, "find_spec", lambda name: None)
    grouping.missing.cache_clear()
    try:
        assert choose("auto", facts(SGD(), torch.float32, rows=10)) == "reference"
        with pytest.raises(ConfigError, match="numba is not installed"):
            choose("numba", facts(SGD(), torch.float32, rows=10))
    finally:
        grouping.missing.cache_clear()


def test_other_devices_and_names_are_refused() -> None:
    assert "for the CPU, not for cuda" in str(cpu.cannot(replace(facts(SGD(), torch.float32), device=torch.device("cuda"))))
    with pytest.raises(ConfigError, match="kernel must be one of auto, reference, numba, triton, fbgemm, not 'other'"):
        choose("other", facts(SGD(), torch.float32, rows=10))
