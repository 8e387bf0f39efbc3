"""How copies are reduced: whole or by rows, the same on all ranks, and with the same numbers."""

from __future__ import annotations

import re
from collections import Counter
from unittest import mock

import pytest
import torch

import shardembed as se
from shardembed.comm.channels import CHANNELS
from shardembed.errors import DisagreementError
from shardembed.store import reductions
from shardembed.store.slab import Slab
from tests.harness import run_ranks
from tests.ranks.as_on_gpus import two_communicators

ROWS = 50
TABLES = [
    se.TableConfig("a", ROWS, 3),
    se.TableConfig("b", ROWS, 5, dtype=torch.bfloat16),
    se.TableConfig("c", ROWS, 3, dtype=torch.float64, padding_idx=0),
    se.TableConfig("d", ROWS, 5, pooling=None),
]
Sums = list[tuple[torch.Tensor, torch.Tensor]]


def collection(**settings: object) -> se.EmbeddingCollection:
    given = {"optimizer": se.optim.Adagrad(lr=0.1), "plan": se.replicated(), **settings}
    return se.EmbeddingCollection(TABLES, **given)  # type: ignore[arg-type]


def rows_of(rank: int, slab: Slab, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some rank: distinct rows of this slab, ascending, and numbers of very different sizes; rank 1 has none."""
    seed = torch.Generator().manual_seed(100 * slab.spec.index + rank)
    count = 0 if rank == 1 else int(torch.randint(1, most, (1,), generator=seed))
    count = min(count, len(slab.weights))
    rows = torch.randperm(len(slab.weights), generator=seed)[:count].sort().values
    sizes = 10.0 ** torch.randint(-4, 5, (count, 1), generator=seed)
    return rows, (torch.randn(count, slab.spec.width, generator=seed, dtype=torch.float64) * sizes).to(torch.float32)


def summed(rank: int, world_size: int, most: int, dtype: torch.dtype) -> tuple[Sums, Sums, Counter[tuple[str, str]]]:
    """What a rank finds, what one finds that adds in the order of ranks, and the calls that were made."""
    emb, slabs = collection(), collection().journey.slabs
    mine = [rows_of(rank, slab, most) for slab in slabs]
    comm = emb.journey.comm
    comm.tally.clear()
    with mock.patch.object(reductions, "COUNTED", 0):
        given = [(rows, values.to(dtype)) for rows, values in mine]
        found = reductions.sum_over_ranks(slabs, given, dtype, "step: reduce copies", comm, 1)
    wanted = []
    for slab in slabs:
        total, touched = torch.zeros(slab.weights.shape[0], slab.spec.width, dtype=dtype), torch.zeros(len(slab.weights))
        for other in range(world_size):
            rows, values = rows_of(other, slab, most)
            total[rows] += values.to(dtype)
            touched[rows] = 1
        rows_U = touched.nonzero().squeeze(1)
        wanted.append((rows_U, total[rows_U]))
    return found, wanted, comm.tally.calls


BY_ROWS = {("all_to_all", "step: reduce copies, counts"): 1, ("all_to_all", "step: reduce copies"): 1}
WHOLE = {("all_to_all", "step: reduce copies, counts"): 1, ("all_reduce", "step: reduce copies"): 1}


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_few_rows_are_added_in_the_order_of_ranks(world_size: int, dtype: torch.dtype) -> None:
    for found, wanted, calls in run_ranks(world_size, summed, ROWS // 4, dtype):
        for (rows_U, sums_UW), (wanted_U, wanted_UW) in zip(found, wanted, strict=True):
            assert torch.equal(rows_U, wanted_U)
            assert torch.equal(sums_UW, wanted_UW)
            assert sums_UW.dtype == dtype
        assert calls == BY_ROWS


def test_many_rows_are_reduced_whole() -> None:
    for found, wanted, calls in run_ranks(3, summed, 50 * ROWS, torch.float64):
        for (rows_U, sums_UW), (wanted_U, wanted_UW) in zip(found, wanted, strict=True):
            assert torch.equal(rows_U, wanted_U)
            torch.testing.assert_close(sums_UW, wanted_UW, rtol=1e-12, atol=1e-10)
        assert calls == WHOLE


def alone(rank: int, world_size: int, count: int) -> Counter[tuple[str, str]]:
    """The calls where the last rank has so many rows of one table, and the others none."""
    emb = se.EmbeddingCollection([se.TableConfig("a", ROWS, 3)], optimizer=se.optim.SGD(lr=0.1), plan=se.replicated())
    rows = torch.arange(count if rank == world_size - 1 else 0)
    comm = emb.journey.comm
    comm.tally.clear()
    with mock.patch.object(reductions, "COUNTED", 0):
        given = [(rows, torch.ones(len(rows), 3))]
        ((rows_U, sums_UW),) = reductions.sum_over_ranks(emb.journey.slabs, given, torch.float32, "step: reduce copies", comm, 1)
    assert torch.equal(rows_U, torch.arange(count)), f"{rows_U}"
    assert torch.equal(sums_UW, torch.ones(count, 3)), f"{sums_UW}"
    return comm.tally.calls


def test_a_rank_that_has_nearly_all_rows_does_not_send_them_to_each_other_rank() -> None:
    """It would have the tables in memory as often as there are ranks."""
    assert run_ranks(4, alone, 10) == [BY_ROWS] * 4
    assert run_ranks(4, alone, 13) == [WHOLE] * 4


def trained(rank: int, world_size: int, counted: int, deterministic: bool, optimizer: str) -> tuple[list[torch.Tensor], set[str]]:
    """The tables after some steps of micro-batches, clipped, one table frozen in between; and the calls of the steps."""
    kind = {"Adam": se.optim.Adam(lr=0.1), "RowwiseAdagrad": se.optim.RowwiseAdagrad(lr=0.1), "none": None}[optimizer]
    with mock.patch.object(reductions, "COUNTED", counted):
        emb = collection(optimizer=kind, deterministic=deterministic)
        own = list(emb.parameters())
        stepped = torch.optim.SGD(own, lr=0.1) if own else se.Optimizer(emb, micro_batches=2)
        emb.journey.comm.tally.clear()
        for step in range(4):
            if step in (1, 2):
                emb.journey.freezing.change(frozenset({0}), step == 1)
            for micro in range(2):
                seed = torch.Generator().manual_seed(100 * step + 10 * micro + rank)
                ids = {table.name: torch.randint(ROWS, (2, 2), generator=seed) for table in TABLES}
                torch.stack([output.double().square().sum() for output in emb(ids).values()]).sum().backward()
            se.clip_grad_norm_(emb, 0.5)
            stepped.step()
            stepped.zero_grad()
        calls = {operation for operation, stage in emb.journey.comm.tally.calls if stage.endswith("reduce copies")}
    return [emb.rows(table.name, torch.arange(ROWS)) for table in TABLES], calls


@pytest.mark.parametrize(
    ("deterministic", "optimizer"), [(False, "Adam"), (False, "RowwiseAdagrad"), (True, "RowwiseAdagrad"), (False, "none")]
)
def test_tables_learn_the_same_either_way(deterministic: bool, optimizer: str) -> None:
    by_rows = run_ranks(2, trained, 0, deterministic, optimizer)
    whole = run_ranks(2, trained, 1 << 40, deterministic, optimizer)
    assert [calls for _, calls in [*by_rows, *whole]] == [{"all_to_all"}] * 2 + [{"all_reduce"}] * 2
    for found, _ in [*by_rows, *whole]:  # of two numbers the sum is the same bits in either order
        for one, other in zip(found, whole[0][0], strict=True):
            assert torch.equal(one, other)


def on_gpus(rank: int, world_size: int) -> list[str]:
    """What goes by communicators in a step, as over NCCL."""
    with two_communicators(world_size) as (group, carried), mock.patch.object(reductions, "COUNTED", 0):
        emb = collection(process_group=group)
        emb({table.name: torch.tensor([[1, 2 + rank]]) for table in TABLES})["a"].sum().backward()
        carried.clear()
        se.Optimizer(emb).step()
        return list(carried)


def test_counts_go_the_way_of_the_rows() -> None:
    """On GPUs there are no channels of a step."""
    for carried in run_ranks(2, on_gpus, fresh_ranks=True):
        assert len(carried) == 2
        assert all(": step of of collection 1: " in line for line in carried)


def differ(rank: int, world_size: int, collections: int) -> None:
    """One rank has made another call before; or ranks step other collections, whose exchanges go over one channel."""
    made = [collection() for _ in range(collections)]
    chosen = made[-1] if rank == 1 else made[0]
    slabs, comm = chosen.journey.slabs, chosen.journey.comm
    if rank == 1 and collections == 1:
        comm.history.note("step", "something that the others have not done", 1)
    with mock.patch.object(reductions, "COUNTED", 0):
        given = [rows_of(rank, slab, 10) for slab in slabs]
        number = 1 if chosen is made[0] else collections
        reductions.sum_over_ranks(slabs, given, torch.float32, "step: reduce copies", comm, number)


@pytest.mark.parametrize(
    ("collections", "says"),
    [
        (1, "all ranks came to .*reduce copies, counts.* not by the same"),
        (1 + CHANNELS["step"], f"rank 0 is there with collection 1; rank 1 .* {1 + CHANNELS['step']}"),
    ],
)
def test_ranks_that_went_other_ways_hear_of_it_before_sizes_differ(collections: int, says: str) -> None:
    found = run_ranks(2, differ, collections, fresh_ranks=True, expect_errors=True, timeout=120)
    for outcome in found:
        assert isinstance(outcome.error, DisagreementError)
        assert re.search(says, str(outcome.error))


def wide(rank: int, world_size: int) -> list[bool]:
    """With rows numbered in 64 bits, in a message of 32."""
    emb = collection()
    slabs, comm = emb.journey.slabs, emb.journey.comm
    found = []
    for key_dtype in (torch.int32, torch.int64):
        with (
            mock.patch.object(reductions, "COUNTED", 0),
            mock.patch("shardembed.store.slab_spec.SlabSpec.key_dtype", property(lambda spec, dtype=key_dtype: dtype)),
        ):
            given = [rows_of(rank, slab, ROWS // 5) for slab in slabs]
            found.append(reductions.sum_over_ranks(slabs, given, torch.float32, "step: reduce copies", comm, 1))
    return [torch.equal(a, b) for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True)]


def test_wide_numbers_of_rows_arrive() -> None:
    for alike in run_ranks(2, wide):
        assert alike
        assert all(alike)
