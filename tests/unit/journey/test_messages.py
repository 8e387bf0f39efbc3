"""Vectors on a wire that is narrower than they are, over a Comm whose other ranks are not there."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.own_work import Echo
from shardembed.journey.messages import Sender, send_back
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
    (found,) = send_back([torch.full((2, width), 1e6)], Request((), layout, layout, call=1), sender, Echo(2))
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.full((2, width), arrives))
