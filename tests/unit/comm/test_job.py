"""What a rank joins its job with, and what then carries tensors of GPUs, by what torch is made to say of these."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm import communicators, job, rendezvous
from shardembed.comm.communicators import nccl_carries
from shardembed.comm.heartbeat import HEADSTART


@pytest.mark.parametrize(
    ("gpus", "backend", "joined", "device"),
    [
        (0, None, "gloo", None),
        (4, None, "cpu:gloo,cuda:nccl", 1),
        (1, None, "cpu:gloo,cuda:nccl", 0),
        (4, "gloo", "gloo", 1),
        (0, "mpi", "mpi", None),
    ],
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
    monkeypatch.setattr(job, "nccl_carries", lambda group: "nccl" in joined)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", FakeGroup)
    FakeGroup.limits.clear()
    se.init(20.0, backend=backend, keep_memory=False)
    assert seen == {"backend": joined, "device": device}
    # DistributedDataParallel's calls go by the job's group: its watchdog, which names nobody, is not to end the process first.
    assert FakeGroup.limits == ([("cuda", 20.0 + HEADSTART)] if "nccl" in joined else [])


class FakeGroup:
    """Of a job, as torch has it: with a backend for each type of device."""

    limits: ClassVar[list[tuple[str, float]]] = []

    def __init__(self, bound: torch.device | None = None) -> None:
        self.bound_device_id = bound

    def _get_backend(self, device: torch.device) -> Any:
        return SimpleNamespace(_set_default_timeout=lambda limit: self.limits.append((device.type, limit.total_seconds())))


@pytest.mark.parametrize(
    ("group", "job_bound", "wanted", "device"),
    [
        (None, None, None, "cuda:2"),  # the current one
        (None, "cuda:3", None, "cuda:3"),
        (FakeGroup(torch.device("cuda:1")), "cuda:3", None, "cuda:1"),
        (FakeGroup(), "cuda:3", "cuda", "cuda:3"),
        (None, None, "cuda", "cuda:2"),
        (None, "cuda:3", "cuda:0", "cuda:0"),
        (None, "cuda:3", "cpu", "cpu"),
    ],
)
def test_the_device_is_what_was_asked_for_or_the_groups_or_the_current_one(
    monkeypatch: pytest.MonkeyPatch, group: Any, job_bound: str | None, wanted: str | None, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    bound = torch.device(job_bound) if job_bound else None
    monkeypatch.setattr(communicators, "dist", SimpleNamespace(**vars(dist) | {"group": SimpleNamespace(WORLD=FakeGroup(bound))}))
    assert job.chosen_device(wanted, group) == torch.device(device)


def test_without_a_gpu_the_device_is_the_cpu_or_torchs_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert job.chosen_device(None) == torch.device("cpu")
    assert job.chosen_device("cuda") == torch.device("cuda")


def test_ranks_that_would_share_a_gpu_are_told() -> None:
    assert communicators.shared(["a1 cuda:0 of x", "b2 cuda:1 of x", "c3 cuda:0 of y"]) == ""
    assert communicators.shared([" cpu of x", " cpu of x"]) == "", "ranks may share a host"
    said = communicators.shared(["a1 cuda:0 of x", "b2 cuda:1 of x", "a1 cuda:0 of pod-7"])
    assert said.startswith(
        "ranks [0, 2] share the GPU a1, and NCCL takes one rank a GPU (rank 0 has cuda:0 of x; rank 2 has cuda:0 of pod-7). "
    )
    assert said.endswith('or have Gloo carry, with se.init(backend="gloo")')


def test_a_group_of_some_ranks_is_made_without_a_split_of_the_jobs_communicator(monkeypatch: pytest.MonkeyPatch) -> None:
    bound = torch.device("cuda:1")
    job_group, seen = FakeGroup(bound), []
    made = mock.create_autospec(dist.ProcessGroup, instance=True)

    def new_group(*args: Any, **named: Any) -> Any:
        seen.append(job_group.bound_device_id)
        if len(seen) > 1:
            raise RuntimeError("no")
        return made

    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_group", lambda: job_group)
    assert rendezvous.new_group([0, 2], 5.0, [], "nccl") is made
    with pytest.raises(RuntimeError):
        rendezvous.new_group([0, 2], 5.0, [], "nccl")
    assert seen == [None, None], "torch splits, for which ranks would have to call that are not in the group"
    assert job_group.bound_device_id == bound


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
