"""Saves and loads on streams of their caller's, while the device is far behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardembed as se

ROWS = 400_000


@pytest.fixture(autouse=True)
def checkpoints() -> None:
    pytest.importorskip("pydantic")  # which they need


def model() -> se.EmbeddingCollection:
    return se.EmbeddingCollection([se.TableConfig("a", ROWS, 32)], optimizer=se.optim.Adagrad(lr=0.1), device="cuda")


def keep_busy() -> None:
    busy = torch.ones(6000, 6000, device="cuda")
    for _ in range(30):
        busy = (busy @ busy).clamp_(max=1.0)


def weights(emb: se.EmbeddingCollection) -> torch.Tensor:
    return emb.journey.slabs[0].weights


@pytest.mark.parametrize("background", [False, True])
def test_a_save_holds_what_its_callers_stream_was_asked_for_before(tmp_path: Path, background: bool) -> None:
    emb, other = model(), model()
    with torch.cuda.stream(torch.cuda.Stream()):
        keep_busy()
        weights(emb).fill_(7.0)
        pending = (se.async_save_checkpoint if background else se.save_checkpoint)(tmp_path, emb, step=1)
        weights(emb).fill_(8.0)
        if isinstance(pending, se.PendingSave):
            pending.wait()
    with torch.cuda.stream(torch.cuda.Stream()):
        keep_busy()
        weights(other).fill_(9.0)  # behind which the load comes
        se.load_checkpoint(tmp_path, other)
        assert (weights(other) == 7.0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_what_passes_through_pinned_buffers_is_whole(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    from shardembed.checkpoint import staging

    monkeypatch.setattr(staging, "BUFFER_BYTES", 1 << 20)
    data = torch.randn(100_003, 33, device="cuda").to(dtype)
    keep_busy()
    data.neg_() if dtype != torch.bool else data.logical_not_()
    copied = staging.Staging().copy(len(data), lambda first, stop: data[first:stop])
    assert not copied.is_pinned()
    assert torch.equal(copied, data.cpu())
