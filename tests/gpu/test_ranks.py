"""Ranks on GPUs: over Gloo on one that they share, and over NCCL where each has its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.errors import CollectiveError
from tests.harness import run_ranks

TABLES = [
    se.TableConfig("rows", 3000, 32, feature_names=["rows", "list"], pooling={"rows": "sum", "list": None}),
    se.TableConfig("columns", 2000, 64, pooling="mean"),
    se.TableConfig("copies", 500, 64),
]
PLAN = {"rows": se.row_wise(), "columns": se.column_wise(), "copies": se.replicated()}
FEATURES = {"rows": 3000, "list": 3000, "columns": 2000, "copies": 500}
STEPS = 6
Loop = Callable[[Iterable[Any], se.EmbeddingCollection], Iterable[Any]]


def train(rank: int, group: dist.ProcessGroup, device: torch.device, loop: Loop, sent_from: torch.device) -> list[torch.Tensor]:
    emb = se.EmbeddingCollection(
        TABLES, optimizer=se.optim.RowwiseAdagrad(lr=0.1), plan=PLAN, process_group=group, device=device, deterministic=True
    )
    optimizer = se.Optimizer(emb, on_nonfinite="raise")

    def batches() -> Iterable[dict[str, torch.Tensor]]:
        for step in range(STEPS):
            seed = torch.Generator().manual_seed(10 * step + rank)
            yield {name: torch.randint(rows, (256, 8), generator=seed).to(sent_from) for name, rows in FEATURES.items()}

    for batch in loop(batches(), emb):
        torch.stack([output.square().sum() for output in emb(batch).values()]).sum().backward()
        se.clip_grad_norm_(emb, 1e9)
        optimizer.step()
    return [emb.rows(table.name, torch.arange(table.num_embeddings)).cpu() for table in TABLES]


def differing(rank: int, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """The loops that end in other bits than the plain one."""
    plain = train(rank, group, device, lambda loader, emb: loader, device)
    found = []
    for sent_from in (torch.device("cpu"), device):
        for depth in (1, 2):
            ahead = train(rank, group, device, lambda loader, emb, depth=depth: se.prefetched(loader, emb, depth), sent_from)
            if not all(map(torch.equal, ahead, plain)):
                found.append(f"depth {depth}, batches on {sent_from}")
    return found


def group_over(backend: str, world_size: int) -> dist.ProcessGroup:
    group = dist.new_group(list(range(world_size)), backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return group


def sharing(rank: int, world_size: int, device: str) -> list[str]:
    return differing(rank, group_over("gloo", world_size), torch.device(device, 0) if device == "cuda" else torch.device(device))


def test_ranks_that_share_a_gpu_end_with_the_bits_of_the_plain_loop() -> None:
    assert run_ranks(2, sharing, "cuda", timeout=600) == [[], []]


def sharing_by_mistake(rank: int, world_size: int) -> str:
    torch.cuda.set_device(0)
    with pytest.raises(CollectiveError) as caught:
        Comm.of(group_over("cpu:gloo,cuda:nccl", world_size), timeout=120.0)
    return str(caught.value)


def test_ranks_that_share_a_gpu_under_nccl_are_told_before_it_is_asked() -> None:
    for said in run_ranks(2, sharing_by_mistake, timeout=600, fresh_ranks=True):
        assert said.startswith("ranks [0, 1] share the GPU "), said


def on_its_own(rank: int, world_size: int) -> list[int]:
    """The GPUs that this process has taken memory of when threads of ours have worked."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    differing(rank, group_over("cpu:gloo,cuda:nccl", world_size), device)
    taken = torch._C._cuda_hasPrimaryContext  # pyright: ignore[reportAttributeAccessIssue]
    return [index for index in range(torch.cuda.device_count()) if taken(index)]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_rank_takes_memory_of_its_own_gpu_alone() -> None:
    assert run_ranks(2, on_its_own, timeout=600, fresh_ranks=True) == [[0], [1]]


def bound(rank: int, world_size: int, store: str) -> list[int]:
    """The job's group is bound to a device that is not the current one, and tables are on some of its ranks."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(0)
    dist.destroy_process_group()  # that of the pool
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{store}", rank=rank, world_size=world_size, device_id=device)
    se.init(timeout=120.0)
    assert torch.cuda.current_device() == rank
    some, sizes = dist.new_group([0, world_size - 1]), []  # by all ranks, for torch has the others split their communicator too
    for group in (None, some):
        if group is None or isinstance(group, dist.ProcessGroup):  # and not a number that says "not a member"
            emb = se.EmbeddingCollection(TABLES, plan=PLAN, process_group=group, device="cuda")
            assert emb.journey.device == device
            outputs = emb({name: torch.arange(8, device=device).view(2, 4) for name in FEATURES})
            sizes.append(sum(output.numel() for output in outputs.values()))
    dist.destroy_process_group()
    return sizes


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="a group of some ranks needs three GPUs")
def test_a_job_that_is_bound_to_its_devices_and_a_group_of_some_of_its_ranks(tmp_path: Path) -> None:
    whole, *_, last = run_ranks(3, bound, str(tmp_path / "store"), timeout=600, fresh_ranks=True)
    assert len(whole) == len(last) == 2
    assert whole == last


def apart(rank: int, world_size: int) -> tuple[list[str], int | None, int, int]:
    """Differing loops; bytes that communicators took at the start, and that the device has lost since; ranks of the node."""
    torch.cuda.set_device(rank)
    group = group_over("cpu:gloo,cuda:nccl", world_size)
    comm = Comm.of(group)
    before = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    found = differing(rank, group, torch.device("cuda", rank))
    torch.cuda.synchronize()
    return found, comm.communicator_bytes, before - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved(), world_size


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL takes one rank a GPU, and there is one GPU")
def test_nccl_is_connected_at_the_start_and_never_again() -> None:
    pytest.importorskip("pydantic")  # which the planner needs
    from shardembed.planner.communicators import communicator_bytes

    for different, taken, later, ranks in run_ranks(min(4, torch.cuda.device_count()), apart, timeout=600):
        assert different == []
        assert later < 256 << 20, "something was connected in a step"
        assert taken is not None
        assert 0 < taken < 1.5 * communicator_bytes(ranks, ranks), "planner/communicators.py takes them for too small"
