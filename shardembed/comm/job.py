"""The job this process is a rank of: how it is joined and left, and what of the machine a rank has."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from shardembed.comm.comm import DEFAULT_TIMEOUT, Comm, close_all
from shardembed.comm.communicators import device_of, nccl_carries
from shardembed.comm.rendezvous import meet, step_back
from shardembed.kernels.memory import keep_freed_memory

_joined: list[bool] = []  # not empty once `init` has made the job's group


@atexit.register
def _leave() -> None:
    """Close what is still open: a Gloo group that outlives the interpreter aborts the process."""
    close_all()
    if _joined and dist.is_initialized():
        dist.destroy_process_group()


def init(
    timeout: float = DEFAULT_TIMEOUT, heartbeat: bool | None = None, keep_memory: bool = True, backend: str | None = None
) -> Comm:
    """Join the job that torchrun (or a scheduler that sets RANK and WORLD_SIZE) started, or the process group that exists
    already.

    Alone, there is one rank and no group. Collective over the job. On GPUs it makes the two NCCL communicators that all collections
    share, and connects every rank with every other, so that no step pays for that and a broken network shows here. A rank's GPU
    is number LOCAL_RANK of those that it sees, counted round; of a group that exists, that which it is bound to, else the current
    one.

    Args:
        timeout: seconds after which a collective that some ranks miss ends in a CollectiveError.
        heartbeat: have a thread watch over all collectives, or over none; by default over those on GPUs, which return before
            they are done, so that no error can be raised. It says which ranks are dead, stopped or hang elsewhere, and ends the
            process.
        keep_memory: have glibc keep what this process frees (`kernels.memory`): faster steps, and memory stays at its peak.
        backend: of the process group that is made here, as torch.distributed names it; by default Gloo, and beside it NCCL where
            there are GPUs. With "gloo" that carries the tensors of GPUs too: slow, but several ranks may share a GPU.

    Raises:
        CollectiveError: on every rank, when GPUs cannot be connected, or two ranks have one.
    """
    if keep_memory:
        keep_freed_memory()
    if not dist.is_initialized() and "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        usual = "gloo"
        if torch.cuda.is_available():
            # Schedulers often show each rank one GPU, its own, whatever its number.
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            usual = "cpu:gloo,cuda:nccl"
        timeout = float(timeout)  # NumPy's are none to timedelta
        store, rank, world_size = meet(timeout)
        dist.init_process_group(backend or usual, timeout=timedelta(seconds=timeout), store=store, rank=rank, world_size=world_size)
        _joined.append(True)
        if torch.cuda.is_available() and nccl_carries(dist.group.WORLD) and heartbeat is not False:
            step_back(dist.distributed_c10d._get_default_group(), ["cuda"], timeout)
    elif dist.is_initialized() and nccl_carries(dist.group.WORLD):
        torch.cuda.set_device(device_of(None))  # else what is asked without naming a device goes to GPU 0
    return Comm.of(timeout=timeout, heartbeat=heartbeat)


def default_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """This rank's GPU where there is one (see `communicators.device_of`), else the CPU."""
    return device_of(group) if torch.cuda.is_available() else torch.device("cpu")


def chosen_device(wanted: torch.device | str | None, group: dist.ProcessGroup | None = None) -> torch.device:
    """The device that `device=wanted` means; "cuda" without a number is this rank's GPU."""
    if wanted is None:
        return default_device(group)
    device = torch.device(wanted)
    return default_device(group) if device.type == "cuda" and device.index is None and torch.cuda.is_available() else device


def ranks_per_node(world_size: int) -> int:
    """How many ranks share a node, as torchrun says; all of them without it."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
