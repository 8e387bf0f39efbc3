"""The order of entries and the merge of duplicates in Triton: exact, in the order of arrival, the same bits every time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardembed.kernels import grouping
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.triton.kernel import TritonKernel
from shardembed.kernels.triton.merge import merge
from shardembed.kernels.triton.order import DIRECT, LEAST_DIRECT, Asked, direct_of, orders
from shardembed.optim import SGD
from tests.amount import examples
from tests.unit.kernels.triton_cases import DEVICE, data_of, gradients, order_of, there


def merged(waiting: Gradients, rows: int, direct: int = DIRECT) -> tuple[torch.Tensor, torch.Tensor]:
    made = there(waiting)
    rows_U, grads_UW = merge(made, order_of(made, rows, direct))
    return rows_U.cpu(), grads_UW.cpu()


def check(waiting: Gradients, rows: int, direct: int = DIRECT) -> None:
    for got, wanted in zip(merged(waiting, rows, direct), grouping.merge(waiting, rows), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("width", [1, 7, 100, 1024])
@pytest.mark.parametrize("lengths", [None, [3, 0, 9, 1]], ids=["singles", "bags"])
def test_short_runs_are_summed_in_the_order_of_arrival(width: int, lengths: list[int] | None) -> None:
    """So the bits are torch's, though the numbers are not whole."""
    torch.manual_seed(width)
    for dtype in (torch.float32, torch.float64):
        check(gradients(5, lengths, 13 if lengths is None else 4, width, dtype, whole=False), 5)


@examples(20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.lists(st.integers(0, 12), max_size=12), st.booleans(), st.integers(1, 4))
def test_long_runs_are_cut_and_no_entry_is_lost(seed: int, rows: int, lengths: list[int], bags: bool, direct: int) -> None:
    """With whole numbers, whose sums are exact however they are cut, and limits so low that runs are cut in every way."""
    torch.manual_seed(seed)
    segments = len(lengths) if bags else sum(lengths)
    check(gradients(rows, lengths if bags else None, segments, 3, torch.float32, whole=True), rows, direct)


def test_a_hot_row_is_cut_into_as_many_pieces_as_they_are_long() -> None:
    torch.manual_seed(0)
    many = DIRECT * DIRECT + 100
    waiting = gradients(3, None, many + DIRECT + 2, 2, torch.float32, whole=True)
    waiting.rows_E[:] = torch.tensor([1] * DIRECT + [0] * many + [2, 2])[torch.randperm(many + DIRECT + 2)]
    check(waiting, 3)
    made = there(waiting)
    pieces = order_of(made, 3).pieces
    assert pieces is not None
    count = -(-many // (2 * DIRECT))
    assert int(pieces.count) == count
    assert pieces.starts.tolist() == [0, count, count, count], "rows with few duplicates have none"
    assert int((pieces.ends - pieces.begins)[:count].sum()) == many


def test_narrow_rows_are_cut_sooner_whoever_orders_them() -> None:
    """A tile of many rows takes as long as the one with most duplicates. The forward orders, or the step: the bits are the same."""
    assert [direct_of(width) for width in (1, 8, 16, 32, 64, 128, 512, 4096)] == [8, 8, 8, 16, 32, 64, 64, 64]
    torch.manual_seed(0)
    waiting = there(gradients(4, None, 100, 4, torch.float32, whole=False))
    kernel = TritonKernel(data_of(SGD(0.1), torch.zeros(4, 4, device=DEVICE)))
    (made,) = orders([Asked(waiting.rows_E, None, 4, direct_of(4))])
    assert made.pieces is not None
    assert int(made.pieces.count) > 100 // DIRECT + 4
    assert int((made.pieces.ends - made.pieces.begins)[: int(made.pieces.count)].max()) <= LEAST_DIRECT
    for one, other in zip(kernel.merge(waiting, made), kernel.merge(waiting, None), strict=True):
        assert torch.equal(one, other)


def test_the_bits_of_a_sum_depend_on_its_own_gradients_only() -> None:
    torch.manual_seed(0)
    waiting = gradients(2, None, 200, 5, torch.float32, whole=False)
    rows_U, sums = merged(waiting, 2)
    assert torch.equal(merged(waiting, 2)[1], sums)
    for row, total in zip(rows_U.tolist(), sums, strict=True):
        own = waiting.rows_E == row
        alone = merged(Gradients(waiting.rows_E[own], None, waiting.grads_SW[own]), 2)[1]
        assert torch.equal(alone[0], total)
        exact = waiting.grads_SW[own].double()
        assert ((total - exact.sum(0)).abs() <= len(exact) * torch.finfo(torch.float32).eps * exact.abs().sum(0)).all()


@pytest.mark.parametrize("offsets", [None, torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)])
def test_no_entries_make_no_rows(offsets: torch.Tensor | None) -> None:
    segments = 0 if offsets is None else len(offsets) - 1
    rows_U, sums = merged(Gradients(torch.empty(0, dtype=torch.int64), offsets, torch.ones(segments, 3)), 7)
    assert rows_U.shape == (0,)
    assert rows_U.dtype == torch.int64
    assert sums.shape == (0, 3)


def test_rows_beyond_32_bits_keep_their_numbers() -> None:
    rows = torch.tensor([2**40, 3, 2**31, 3, 2**40, 2**32])
    check(Gradients(rows, None, torch.arange(12.0).view(6, 2)), 2**40 + 1)


def test_the_order_knows_no_more_rows_than_there_are() -> None:
    assert order_of(there(Gradients(torch.tensor([1] * 9), None, torch.ones(9, 1))), 2).bound == 2
    assert order_of(there(Gradients(torch.tensor([1, 1]), None, torch.ones(2, 1))), 100).bound == 2
    assert order_of(there(Gradients(torch.tensor([1, 1]), None, torch.ones(2, 1))), 100).starts.device.type == DEVICE.type


def test_slabs_are_ordered_together_as_each_alone() -> None:
    torch.manual_seed(3)
    asked = [(5, [3, 0, 1, 2], 4), (1, None, 0), (2, None, 300), (7, [0, 0], 2), (2**33, None, 9), (3, [90, 0, 85], 3)]
    slabs = [(gradients(rows, lengths, segments, 1, torch.float32, whole=True), rows) for rows, lengths, segments in asked]
    made = [(there(waiting), rows) for waiting, rows in slabs]
    directs = [3, 64, 8, 2, 64, 7]
    pairs = zip(made, directs, strict=True)
    together = orders([Asked(waiting.rows_E, waiting.offsets, rows, direct) for (waiting, rows), direct in pairs])
    for (waiting, rows), one, direct in zip(made, together, directs, strict=True):
        alone = order_of(waiting, rows, direct)
        distinct = int(alone.count)
        assert int(one.count) == distinct
        for name in ("rows_E", "segments_E", "starts"):
            assert getattr(one, name).tolist() == getattr(alone, name).tolist(), name
        assert (one.pieces is None) == (alone.pieces is None)
        if one.pieces is not None and alone.pieces is not None:
            assert one.pieces.starts.tolist() == alone.pieces.starts.tolist()
            pieces = int(one.pieces.count)
            assert pieces == int(alone.pieces.count)
            assert one.pieces.begins[:pieces].tolist() == alone.pieces.begins[:pieces].tolist()
            assert one.pieces.ends[:pieces].tolist() == alone.pieces.ends[:pieces].tolist()
