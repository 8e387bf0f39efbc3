"""Collections that run on the Triton kernels: the oracle's numbers, and the reference's bits where sums have one order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import shardembed as se
from benchmarks.launches import as_on_a_device
from shardembed import optim
from shardembed.kernels.triton import order
from shardembed.tables.placement import Packing
from tests.amount import exhaustive
from tests.harness import run_ranks
from tests.held import Piece, pieces
from tests.ranks.cases import cross
from tests.ranks.sharded import check

ROWS, COLUMNS = 30, 6
LAYOUTS = ("row_dealt", "grid_dealt", "column_uneven", "replicated")


@pytest.mark.parametrize("optimizer", [optim.RowwiseAdagrad(lr=0.1), optim.FTRL(lr=0.2, l1=0.05)], ids=["RowwiseAdagrad", "FTRL"])
def test_they_agree_with_whole_tables(optimizer: optim.TableOptimizer) -> None:
    """Rows split over ranks, copies, and two micro-batches a step are among it."""
    case = cross(2, optimizer, torch.float32, steps=2, micro=2, poolings=("sum", "none"), chosen=LAYOUTS.__contains__)
    runs = check(replace(case, kernel="triton"))
    assert {kernel for run in runs for kernel, _ in run.kernels} == {"triton"}


def train(rank: int, world_size: int, kernel: str, packing: Packing = "unique") -> list[Piece]:
    """Tables of each dtype, with padding and random rounding, under every cut."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    cuts = {"rows": se.row_wise(packing=packing), "columns": se.column_wise(), "copies": se.replicated()}
    tables = [
        se.TableConfig(f"{cut} {dtype}", ROWS, COLUMNS, dtype=dtype, init=se.Normal(), padding_idx=3, rounding=rounding)
        for dtype, rounding in zip(dtypes, (None, "stochastic", "stochastic"), strict=True)
        for cut in cuts
    ]
    plan = {table.name: cuts[table.name.split()[0]] for table in tables}
    emb = se.EmbeddingCollection(tables, plan=plan, optimizer=optim.SGD(lr=0.3), kernel=kernel, seed=2)  # pyright: ignore[reportArgumentType]
    assert {slab.kernel.name for slab in emb.journey.slabs} == {kernel}
    learner = se.Optimizer(emb)
    numbers = torch.Generator().manual_seed(rank)
    for _ in range(3):
        ids = torch.randint(0, ROWS, (5, 4), generator=numbers)
        outputs = emb({feature.name: ids for feature in emb.features}).values()
        sum((output.float().square().sum() for output in outputs), torch.zeros(())).backward()
        se.clip_grad_norm_(emb, 50.0)
        learner.step()
    return pieces(emb)


def test_the_tables_are_the_references_bits() -> None:
    for plain, fused in zip(run_ranks(2, train, "reference"), run_ranks(2, train, "triton"), strict=True):
        assert len(plain) == len(fused) == 9
        for one, other in zip(plain, fused, strict=True):
            assert (one.name, one.where) == (other.name, other.where)
            assert torch.equal(one.values, other.values), one.name


def test_rows_are_sorted_in_the_forward_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_in: list[str] = []
    made = order.orders

    def orders(asked: Sequence[order.Asked]) -> list[order.Order]:
        sorted_in.append(stage)
        return made(asked)

    monkeypatch.setattr(order, "orders", orders)
    emb = se.EmbeddingBag(ROWS, COLUMNS, mode="sum", padding_idx=3, optimizer=optim.Adagrad(lr=0.1), kernel="triton")
    learner = se.Optimizer(emb)
    for _ in range(2):
        stage = "forward"
        loss = emb(torch.tensor([[1, 3, 1], [3, 3, 2]])).sum()
        stage = "backward"
        loss.backward()
        stage = "step"
        learner.step()
    assert sorted_in == ["forward", "forward"]
    with torch.no_grad():
        emb(torch.tensor([[1, 2]]))
    assert len(sorted_in) == 2, "nothing can be learned from it"


def train_as_on_a_device(rank: int, world_size: int, packing: Packing) -> list[Piece]:
    with as_on_a_device():
        return train(rank, world_size, "triton", packing)


@pytest.mark.parametrize("packing", [exhaustive("unique"), "bag"])
def test_what_devices_do_between_ranks_gives_the_same_bits(packing: Packing) -> None:
    """Routes, messages and the order of rows by the kernels of devices, and by those of the CPU."""
    here, there = run_ranks(2, train, "triton", packing), run_ranks(2, train_as_on_a_device, packing)
    for one, other in zip([piece for rank in here for piece in rank], [piece for rank in there for piece in rank], strict=True):
        assert (one.name, one.where) == (other.name, other.where)
        assert torch.equal(one.values, other.values), one.name
