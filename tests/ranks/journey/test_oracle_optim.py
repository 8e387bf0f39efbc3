"""Optimizers against further counterparts: FBGEMM's own module, FTRL's settings and starts, gradients read off a step.

Legend: N rows, D columns.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import shardembed as se
from shardembed import optim
from tests.amount import sample_of, sampled
from tests.harness import run_ranks
from tests.held import whole
from tests.oracle import Case, Ftrl, make_bags, together, truth
from tests.ranks.cases import cross
from tests.ranks.sharded import check, train_all

ROWS, COLUMNS, STEPS = 31, 8, 5
SMALL = ("row_dealt", "column_uneven", "replicated")


def small_case(world_size: int, settings: optim.TableOptimizer, placement: se.Placement) -> Case:
    """One float32 table, pooled sums, contributions above zero."""
    numbers = torch.Generator().manual_seed(300)
    table = se.TableConfig("t", ROWS, COLUMNS, init=se.Normal())
    batches = [
        [[{"t": make_bags(numbers, ROWS, COLUMNS, "sum", 3 + rank, 5, positive=True)} for rank in range(world_size)]]
        for _ in range(STEPS)
    ]
    return Case((table,), {"t": settings}, {"t": placement}, batches, curved=False, reduction="sum")


@pytest.mark.parametrize(("world_size", "layout"), sampled(product([2, 3, 1], ["row_wise", "column_wise"])))
def test_rowwise_adagrad_is_fbgemms(world_size: int, layout: str) -> None:
    """EXACT_ROWWISE_ADAGRAD of FBGEMM's module on the whole table, in float32; and the oracle's own formula agrees."""
    tbe = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_training")
    common = pytest.importorskip("fbgemm_gpu.split_table_batched_embeddings_ops_common")
    lr, eps = 0.1, 1e-8
    placement = se.row_wise() if layout == "row_wise" else se.column_wise()
    case = small_case(world_size, optim.RowwiseAdagrad(lr=lr, eps=eps), placement)
    runs = train_all(case)
    start = whole(run.before for run in runs)
    theirs = tbe.SplitTableBatchedEmbeddingBagsCodegen(
        [(ROWS, COLUMNS, common.EmbeddingLocation.HOST, tbe.ComputeDevice.CPU)],
        optimizer=tbe.OptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=lr,
        eps=eps,
    )
    theirs.split_embedding_weights()[0].data.copy_(start["t"])
    for ((*ranks,),) in case.batches:
        bags = [batch["t"] for batch in ranks]
        ids, offsets, _, _ = together(bags, "sum")
        slopes = torch.cat([part.slopes for part in bags]).float()
        (theirs(ids, offsets) * slopes).sum().backward()
    found = whole(run.after for run in runs)
    # Positive contributions, so every step errs by some units of float32 at most; a hundred are plenty and nothing else is as near.
    close = {"rtol": 1e-5, "atol": 1e-5 * lr}
    torch.testing.assert_close(found["t"], theirs.split_embedding_weights()[0].detach(), **close)
    torch.testing.assert_close(found["t.sum"], theirs.split_optimizer_states()[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(truth(case, start).weights["t"].float(), found["t"], **close)


@pytest.mark.parametrize(("world_size", "zero"), sample_of(product([1, 2, 3], [True, False]), (2, True), (3, False)))
def test_ftrl_follows_algorithm_1(world_size: int, zero: bool) -> None:
    for l1, l2, beta in ((0.0, 0.0, 1.0), (0.3, 0.0, 1.0), (0.0, 0.5, 0.25), (0.3, 0.1, 0.5), (5.0, 0.0, 1.0)):
        settings = optim.FTRL(lr=0.2, beta=beta, l1=l1, l2=l2)
        case = cross(
            world_size,
            settings,
            torch.float64,
            steps=4,
            seed=310,
            poolings=("sum", "none"),
            packings=("unique",),
            chosen=lambda layout: layout in SMALL,
        )
        if zero:
            case = replace(case, tables=tuple(replace(table, init=se.Constant(0.0)) for table in case.tables))
        check(case)


def test_the_oracles_ftrl_by_hand() -> None:
    """One coordinate, one number at a time, so that the oracle is not taken on trust."""
    alpha, beta, l1, l2 = 0.5, 1.0, 0.25, 0.125
    weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    learner = Ftrl(weight, optim.FTRL(lr=alpha, beta=beta, l1=l1, l2=l2))
    learner.step(torch.full((1, 1), 3.0, dtype=torch.float64), torch.tensor([True]))
    # z = 3 - sigma * 0, n = 9, w = -(3 - 0.25) / ((1 + 3) / 0.5 + 0.125)
    assert weight.item() == pytest.approx(-2.75 / 8.125, abs=1e-15)
    learner.step(torch.full((1, 1), -4.0, dtype=torch.float64), torch.tensor([True]))
    # sigma = (5 - 3) / 0.5 = 4, z = 3 - 4 + 4 * 2.75 / 8.125 = 0.353846..., n = 25, w = -(z - 0.25) / (6 / 0.5 + 0.125)
    assert weight.item() == pytest.approx(-(-1 + 11 / 8.125 - 0.25) / 12.125, abs=1e-15)
    assert learner.n.item() == 25.0
    learner.step(torch.full((1, 1), 0.0, dtype=torch.float64), torch.tensor([True]))
    assert weight.item() == pytest.approx(-(-1 + 11 / 8.125 - 0.25) / 12.125, abs=1e-15)


def learn_once(rank: int, world_size: int, cases: list[Case]) -> list[torch.Tensor]:
    """Weights after one SGD step with lr 1: the start less the gradient."""
    answers = []
    for case in cases:
        emb = se.EmbeddingCollection(case.tables, optimizer=case.optimizers, plan=case.plan, gradient_reduction="sum")
        bags = case.batches[0][0][rank]["t"]
        source = torch.zeros(ROWS, COLUMNS)
        emb.load_rows("t", source)
        (emb({"t": bags.given})["t"] * bags.slopes.float()).sum().backward()
        se.Optimizer(emb).step()
        answers.append(emb.rows("t", torch.arange(ROWS)))
    return answers


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_of_one_is_the_gradient(world_size: int) -> None:
    """Not looked at while it waits, but told by the rows: eighths add up without rounding, so the numbers are the same bits."""
    placements = [
        replace(placement, packing=packing)
        for placement in (se.row_wise(), se.row_wise(strided=False), se.column_wise(), se.replicated(), se.table_wise(0))
        for packing in ("unique", "bag")
    ]
    cases = [small_case(world_size, optim.SGD(lr=1.0), placement) for placement in placements]
    wanted = np.zeros((ROWS, COLUMNS))
    for batch in cases[0].batches[0][0]:
        bags = batch["t"]
        bag_of = np.repeat(np.arange(len(bags.offsets) - 1), bags.offsets.diff().numpy())
        np.add.at(wanted, bags.ids.numpy(), bags.slopes.numpy()[bag_of])
    for answers in run_ranks(world_size, learn_once, cases):
        for found, placement in zip(answers, placements, strict=True):
            assert torch.equal(found, torch.from_numpy(-wanted).float()), placement
