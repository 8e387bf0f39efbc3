"""Threads of ours on a GPU: on its device before they ask it anything, and out of graphs that others capture."""

from __future__ import annotations

import ctypes
import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardembed.comm import heartbeat, threads
from shardembed.comm.diagnosis import Place
from shardembed.comm.heartbeat import Heartbeat, Watch

GPU = torch.device("cuda", 3)


class FakeDriver:
    """What a driver is asked, in its order, and what it answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> None:
        self.asked: list[str] = []
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: self.asked.append(f"device {device}"))

        def exchange(mode: Any) -> int:
            self.asked.append(f"mode {mode._obj.value}")
            return status

        monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))


def test_a_thread_is_told_its_device_and_then_keeps_out_of_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver(monkeypatch)
    threads.at_home(torch.device("cpu"))
    threads.at_home(None)
    assert driver.asked == []
    threads.at_home(GPU)
    assert driver.asked == ["device cuda:3", f"mode {threads.RELAXED}"]


def test_a_driver_that_cannot_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    FakeDriver(monkeypatch, status=3)
    with caplog.at_level(logging.WARNING, logger="shardembed"):
        threads.at_home(GPU)
        monkeypatch.setattr(threads, "DRIVER", "libcuda.of-tomorrow")
        monkeypatch.undo()
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(threads, "DRIVER", "libcuda.of-tomorrow")
        threads.at_home(GPU)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == f"{threads.RISK}: CUDA error 3"
    assert second.startswith(f"{threads.RISK}: libcuda.of-tomorrow: ")


def test_a_heartbeat_asks_no_event_before_it_is_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "own_store", lambda prefix: dist.HashStore())
    asked: list[str] = []
    enough, watch = threading.Event(), Watch()

    def done() -> bool:
        asked.append(threading.current_thread().name)
        if len(asked) > 2:
            enough.set()
        return False

    watch.leave(watch.enter(Place("all_to_all", "a stage", "", 1, 1)), done)
    asked.clear()  # the main thread asks too
    beating = Heartbeat(0, 2, "a name", 0.8, watch, begin=lambda: asked.append("at home"), end=lambda text: None)
    assert enough.wait(60)
    beating.stop()
    assert asked[0] == "at home"
    assert set(asked[1:]) == {"shardembed-heartbeat"}, "another thread asks the device, and is not at home"
