"""Vectors on a wire that is narrower than they are, over a Comm whose other ranks are not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.own_work import Case, Echo, Rank
from shardembed.journey.messages import Sender, pack_answers, send_back
from shardembed.kernels import grouping
from shardembed.kernels.kernel import Rows
from shardembed.optim import SGD
from shardembed.store.request import Request
from shardembed.store.slab_spec import build_slabs
from shardembed.tables.placement import Cluster, row_wise
from shardembed.tables.plan import resolve
from shardembed.tables.table_config import TableConfig
from shardembed.wire.message import MessageLayout


@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize(("dtype", "arrives"), [(torch.float16, torch.inf), (torch.bfloat16, float(torch.tensor(1e6).bfloat16()))])
def test_values_are_cast_on_the_way(width: int, dtype: torch.dtype, arrives: float) -> None:
    tables = [TableConfig("a", 8, width)]
    specs = build_slabs(tables, resolve(tables, row_wise(), Cluster(2, 2)), [SGD()])
    sender = Sender(1, specs, (dtype,), local=False)
    layout = MessageLayout.of(sender.vectors, np.array([[1, 1]]))
    request, comm = Request((), layout, layout, call=1), Echo(2)
    (found,) = send_back(pack_answers([torch.full((2, width), 1e6)], request, sender, comm), request, sender, comm)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((2, width), arrives))


def test_rows_of_several_slabs_are_read_straight_into_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    if grouping.missing():
        pytest.skip("needs compiled kernels")
    calls: list[str] = []
    monkeypatch.setattr(Rows, "gathered", lambda rows: calls.append("gathered") or rows.weights.index_select(0, rows.rows_E))
    for slabs, wanted in ((3, []), (1, ["gathered"])):  # of one slab the gathered rows are the message
        calls.clear()
        rank = Rank(Case(tables=3, slabs=slabs, rows=10, samples=8, ids=1, packing="unique"), ranks=2)
        rank.step(0)
        assert calls == wanted
        assert sum(slab.looked_up for slab in rank.journey.slabs) > 0


def test_rows_on_a_narrower_wire_are_gathered_first() -> None:
    weights, rows_E = torch.randn(9, 4), torch.tensor([3, 8, 3])
    rows = Rows(weights, rows_E)
    assert rows.to(torch.float32) is rows
    narrow = rows.to(torch.bfloat16)
    assert isinstance(narrow, torch.Tensor)
    assert torch.equal(narrow, weights[rows_E].to(torch.bfloat16))
