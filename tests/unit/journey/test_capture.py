"""A CUDA graph that would hold a lookup or a step of tables is refused, by what torch is made to say of one."""

from __future__ import annotations

import pytest
import torch

import shardembed as se
from shardembed.errors import UnsupportedError


def test_a_graph_takes_neither_a_lookup_nor_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    emb = se.EmbeddingCollection([se.TableConfig("a", 8, 2)], optimizer=se.optim.SGD(0.5))
    optimizer = se.Optimizer(emb)
    before = emb.rows("a", torch.arange(8))
    emb({"a": torch.tensor([1, 2])})["a"].sum().backward()
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(emb.journey, "device", torch.device("cuda"))
    with pytest.raises(UnsupportedError, match="a CUDA graph is being captured, and it cannot hold sharded tables"):
        emb({"a": torch.tensor([3])})
    with pytest.raises(UnsupportedError, match="Capture the dense part"):
        optimizer.step()
    capturing[0] = False
    monkeypatch.setattr(emb.journey, "device", torch.device("cpu"))
    assert torch.equal(emb.rows("a", torch.arange(8)), before), "nothing was done"
    optimizer.step()
    assert not torch.equal(emb.rows("a", torch.arange(8)), before), "the gradients still wait"
