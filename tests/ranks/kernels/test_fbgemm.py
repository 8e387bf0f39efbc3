"""Collections on FBGEMM's kernels, against whole tables."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

import shardembed as se
from shardembed import optim
from shardembed.errors import ConfigError
from shardembed.kernels import fbgemm
from tests.amount import sampled
from tests.ranks.cases import cross
from tests.ranks.sharded import check

pytestmark = pytest.mark.skipif(fbgemm.missing("cpu") is not None, reason=str(fbgemm.missing("cpu")))
OF_FOUR_COLUMNS = ("table_wise", "row_even", "row_dealt", "row_twice", "table_row_wise", "replicated")
OPTIMIZERS = {"SGD": optim.SGD(lr=0.1), "Adagrad": optim.Adagrad(lr=0.1), "RowwiseAdagrad": optim.RowwiseAdagrad(lr=0.1)}


@pytest.mark.parametrize(("world_size", "name"), sampled(product((1, 2, 3), OPTIMIZERS)))
def test_they_agree_with_whole_tables(world_size: int, name: str) -> None:
    """Copies, ranks without rows, every pooling, and two micro-batches a step are among it."""
    case = cross(world_size, OPTIMIZERS[name], torch.float32, steps=3, micro=2, chosen=OF_FOUR_COLUMNS.__contains__)
    runs = check(replace(case, kernel="fbgemm"))
    assert {kernel for run in runs for kernel, _ in run.kernels} == {"fbgemm"}


@pytest.mark.parametrize("update", ["step", "backward"])
def test_a_frozen_table_is_looked_up(update: str) -> None:
    tables = [se.TableConfig("still", 10, 8, frozen=True), se.TableConfig("learns", 10, 8)]
    emb = se.EmbeddingCollection(tables, optimizer=optim.RowwiseAdagrad(lr=0.1), kernel="fbgemm", update=update)  # pyright: ignore[reportArgumentType]
    assert {slab.kernel.name for slab in emb.journey.slabs} == {"fbgemm"}
    before = {table.name: emb.rows(table.name, torch.arange(10)) for table in tables}
    found = emb({table.name: torch.arange(10).view(5, 2) for table in tables})
    torch.testing.assert_close(found["still"], before["still"].view(5, 2, 8).sum(1))
    torch.stack([output.sum() for output in found.values()]).sum().backward()
    if update == "step":
        se.Optimizer(emb).step()
    assert torch.equal(emb.rows("still", torch.arange(10)), before["still"])
    torch.testing.assert_close(emb.rows("learns", torch.arange(10)), before["learns"] - 0.1, rtol=1e-5, atol=1e-5)


def test_rows_in_strips_are_refused_for_a_rowwise_optimizer() -> None:
    tables, plan = [se.TableConfig("t", 10, 8)], se.column_wise([0, 0])
    se.EmbeddingCollection(tables, plan=plan, optimizer=optim.Adagrad(), kernel="fbgemm")
    with pytest.raises(ConfigError, match="cuts the rows of the table into strips"):
        se.EmbeddingCollection(tables, plan=plan, optimizer=optim.RowwiseAdagrad(), kernel="fbgemm")
