"""The NCCL communicators of a job's ranks: two, made and warmed up before the first step.

A communicator takes some gigabytes of every GPU (`planner/communicators.py`), so there is one for what forwards send and one for
all else, and every collection, stage and loop of a process group uses these two. Unlike channels (`channels`), they cannot keep
apart what ranks could confuse; what keeps it apart is order:

    All calls on both are made in the order of the program, by whoever runs it: the main thread, or autograd's while the main
    thread waits for a backward. Nothing beside the main thread calls them. Two communicators whose calls come in another order on
    another rank can wait for each other for ever, since a waiting call holds a part of the GPU that the other may need.

What does run beside the main thread (counts of batches that are sent ahead, a save in the background) speaks of host memory, over
Gloo, on channels of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist

from shardembed.comm.channels import Group
from shardembed.comm.diagnosis import UnansweredError, within
from shardembed.comm.rendezvous import new_group
from shardembed.comm.threads import at_home


@dataclass(frozen=True)
class Communicators:
    """Of one process group.

    Attributes:
        device: of this rank; tensors on devices of its type go this way.
        forward: carries what forwards send.
        rest: carries all else.
        bytes: of the device that both took while they were made; None where that cannot be seen.
    """

    device: torch.device
    forward: dist.ProcessGroup
    rest: dist.ProcessGroup
    bytes: int | None = None

    def of(self, kind: Group) -> dist.ProcessGroup:
        """The one that carries a kind of collective."""
        return self.forward if kind == "forward" else self.rest

    def close(self) -> None:
        """Leave both."""
        for group in (self.forward, self.rest):
            if group in dist.distributed_c10d._world.pg_map:  # else the job's groups were destroyed altogether
                dist.destroy_process_group(group)


def nccl_carries(group: dist.ProcessGroup | None) -> bool:
    """Whether tensors on GPUs go over NCCL: where there are GPUs, and the job was not told to have Gloo carry them."""
    if group is None or not torch.cuda.is_available():
        return False
    return "cuda:gloo" not in str(dist.get_backend_config(group)) and dist.get_world_size(group) > 1


def device_of(group: dist.ProcessGroup | None) -> torch.device:
    """This rank's GPU: that which the group, or the job's, was bound to when it was made; else the one that is current."""
    for one in (group, dist.group.WORLD if dist.is_available() and dist.is_initialized() else None):
        bound: torch.device | None = getattr(one, "bound_device_id", None)
        if bound is not None and bound.type == "cuda":
            return bound
    return torch.device("cuda", torch.cuda.current_device())


def identity(device: torch.device) -> str:
    """What no other GPU is called, on whichever host and by whatever number it is seen; empty for what ranks may share."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def shared(told: Sequence[str]) -> str:
    """What is wrong where two ranks have one GPU, by what each says: its `identity`, and where it is. Empty where none do."""
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(told):
        ranks.setdefault(text.split(" ")[0], []).append(rank)
    for name, those in ranks.items():
        if name and len(those) > 1:
            places = "; ".join(f"rank {rank} has {told[rank].partition(' ')[2]}" for rank in those)
            return (
                f"ranks {those} share the GPU {name}, and NCCL takes one rank a GPU ({places}). Start as many ranks on a node as "
                "it has GPUs, and set LOCAL_RANK or show each rank its own in CUDA_VISIBLE_DEVICES; or have Gloo carry, with "
                'se.init(backend="gloo")'
            )
    return ""


def open_communicators(
    ranks: list[int], device: torch.device, backend: str, watched: Sequence[str], timeout: float
) -> Communicators:
    """Both, connected to all ranks. Collective over them.

    Args:
        backend: "nccl", but for tests.
        watched: types of device on which a heartbeat tells more than the backend's own watchdog.

    Raises:
        RuntimeError: they cannot be made, or the first calls on them do not come through in half of the time limit. The other half
            is left for telling the other ranks.
    """
    before, on = _free(device), [kind for kind in watched if kind == device.type]
    forward, rest = (new_group(ranks, timeout, on, backend) for _ in range(2))
    try:
        within(timeout / 2, partial(_warm_up, forward, rest, device))
    except UnansweredError as error:
        raise RuntimeError(f"the first calls were not through after {timeout / 2:.1f} s") from error
    after = _free(device)
    return Communicators(device, forward, rest, before - after if before is not None and after is not None else None)


def _free(device: torch.device) -> int | None:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _warm_up(forward: dist.ProcessGroup, rest: dist.ProcessGroup, device: torch.device) -> None:
    """Make the connections that steps use. An all-to-all connects each rank with each, an all-reduce rings and trees; NCCL makes
    either when it is first asked for.
    """
    at_home(device)
    for group in (forward, rest):
        values = torch.zeros(group.size(), dtype=torch.int64, device=device)
        ones = [1] * group.size()
        group.alltoall_base(torch.empty_like(values), values, ones, ones, dist.AllToAllOptions()).wait()
    dist.all_reduce(values, group=rest)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
