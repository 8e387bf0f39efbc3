"""Capturing the dense part of a step in a CUDA graph, beside all that runs in threads of ours; what would be in it is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardembed as se
from shardembed.comm import heartbeat
from shardembed.comm.diagnosis import Place
from shardembed.comm.heartbeat import Heartbeat, Watch, device_is_through
from shardembed.comm.threads import at_home
from shardembed.errors import UnsupportedError

GPU = torch.device("cuda", 0)
CAPTURES = 30


@contextmanager
def thread(work: Callable[[], object]) -> Iterator[None]:
    """Do `work` again and again beside what is in here, having begun once when that begins; its error is raised in the end."""
    stop, begun, errors = threading.Event(), threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            at_home(GPU)
            while not stop.is_set():
                work()
                begun.set()
        except BaseException as error:
            errors.append(error)
            begun.set()

    beside = threading.Thread(target=run, daemon=True)
    beside.start()
    assert begun.wait(60)
    try:
        yield
    finally:
        stop.set()
        beside.join()
    assert not errors, errors


def capture(times: int = CAPTURES) -> None:
    """In the mode that forbids other threads nearly everything, which is the usual one."""
    values = torch.zeros(1000, device=GPU)
    values.add_(1)  # loads what it needs
    torch.cuda.synchronize()
    for _ in range(times):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(50):
                values.add_(1)
        values.zero_()
        graph.replay()
        assert torch.equal(values, torch.full_like(values, 50))


def test_what_asks_events_beside_a_capture_does_not_break_it() -> None:
    event = torch.cuda.Event()
    event.record()
    # Of another pool than the one that a graph is captured on: torch has 32 of a priority, which it gives out in turn.
    stream = torch.cuda.Stream(GPU, priority=-1)

    def work() -> None:
        event.query()
        torch.empty(1 << 22, dtype=torch.uint8, pin_memory=True)
        with torch.cuda.stream(stream):
            torch.ones(10, device=GPU).cpu()

    with thread(work):
        capture()


def test_a_heartbeat_beside_a_capture_does_not_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "own_store", lambda prefix: dist.HashStore())
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.001)
    watch, through, asked = Watch(), device_is_through(GPU), list[bool]()
    assert through is not None
    beating = Heartbeat(0, 2, "a name", 600.0, watch, begin=lambda: at_home(GPU))
    standing = watch.enter(Place("all_to_all", "a stage", "", 1, 1))
    watch.leave(standing, lambda: asked.append(through()) or False)  # it asks that from now on, whatever it hears
    captures = 0
    while captures < CAPTURES or (len(asked) < 3 * CAPTURES and captures < 100 * CAPTURES):
        capture(1)
        captures += 1
    beating.stop()
    assert len(asked) >= 3 * CAPTURES, "next to nothing was asked meanwhile"


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows).square().mean()


def train(folder: Path, captured: bool) -> list[torch.Tensor]:
    """Ids sent ahead, checkpoints in the background; the dense part's forward and backward played from a graph if wanted."""
    pytest.importorskip("pydantic")  # which checkpoints need
    from shardembed.checkpoint.save import finish_pending

    torch.manual_seed(0)
    emb = se.EmbeddingCollection([se.TableConfig("a", 5000, 32)], optimizer=se.optim.RowwiseAdagrad(lr=0.1), device="cuda")
    dense, optimizer = Dense().to(GPU), se.Optimizer(emb)
    learning = torch.optim.SGD(dense.parameters(), lr=0.1)
    play: Callable[..., Any] = (
        torch.cuda.make_graphed_callables(dense, (torch.randn(64, 32, device=GPU, requires_grad=True),)) if captured else dense
    )
    batches = ({"a": torch.arange(64 * 4).view(64, 4) * 7 % 5000 + step} for step in range(12))
    for step, batch in enumerate(se.prefetched(batches, emb, depth=2)):
        learning.zero_grad(set_to_none=not captured)
        loss: torch.Tensor = play(emb(batch)["a"])
        loss.backward()
        learning.step()
        optimizer.step()
        if step % 4 == 0:
            se.async_save_checkpoint(folder, emb, step=step)
            if captured:
                capture(3)
    finish_pending()
    return [emb.rows("a", torch.arange(5000)).cpu(), *(parameter.detach().cpu() for parameter in dense.parameters())]


def test_the_dense_part_is_captured_beside_tables_that_learn(tmp_path: Path) -> None:
    plain, captured = train(tmp_path / "plain", False), train(tmp_path / "captured", True)
    for one, other in zip(plain, captured, strict=True):
        torch.testing.assert_close(one, other)


def test_a_graph_that_would_hold_a_lookup_is_refused() -> None:
    emb = se.EmbeddingCollection([se.TableConfig("a", 50, 8)], device="cuda", optimizer=None)
    batch = {"a": torch.arange(8, device=GPU)}
    emb(batch)
    with pytest.raises(UnsupportedError, match="it cannot hold sharded tables"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        emb(batch)
    torch.cuda.synchronize()
    assert emb(batch)["a"].shape == (8, 8)
