"""What a rank joins its job with, and what then carries tensors of GPUs, by what torch is made to say of these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm import communicators, job
from shardembed.comm.communicators import nccl_carries


@pytest.mark.parametrize(
    ("gpus", "backend", "joined", "device"),
    [(0, None, "gloo", None), (4, None, "cpu:gloo,cuda:nccl", 5), (4, "gloo", "gloo", 1), (0, "mpi", "mpi", None)],
)
def test_a_job_is_joined_with_what_its_devices_need(
    monkeypatch: pytest.MonkeyPatch, gpus: int, backend: str | None, joined: str, device: int | None
) -> None:
    seen: dict[str, Any] = {"device": None}
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr(job, "_joined", [])
    monkeypatch.setattr(job, "meet", lambda timeout: (None, 5, 8))
    monkeypatch.setattr(job.Comm, "of", lambda **named: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **named: seen.update(backend=backend))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.update(device=device))
    se.init(backend=backend, keep_memory=False)
    assert seen == {"backend": joined, "device": device}


@pytest.mark.parametrize(
    ("gpus", "config", "ranks", "carries"),
    [
        (True, "cpu:gloo,cuda:nccl", 8, True),
        (True, "cuda:nccl", 8, True),  # of a job that was started with NCCL alone
        (True, "cpu:gloo,cuda:gloo", 8, False),
        (True, "cpu:gloo,cuda:nccl", 1, False),
        (False, "cpu:gloo", 8, False),
    ],
)
def test_nccl_carries_what_the_job_lets_it(
    monkeypatch: pytest.MonkeyPatch, gpus: bool, config: str, ranks: int, carries: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(communicators.dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(communicators.dist, "get_world_size", lambda group: ranks)
    group: Any = object()
    assert nccl_carries(group) is carries
    assert not nccl_carries(None)
