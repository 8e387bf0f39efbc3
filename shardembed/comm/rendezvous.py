"""Where the ranks of a start of the job meet, and how they make groups.

When torchrun starts ranks again after a failure, they get the store of those before them, with the addresses that those left in it
(torch 2.13, Gloo: "connectFullMesh failed"). So the ranks first agree on a name for this start, and put all they write under it.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from shardembed.comm import lifeline
from shardembed.comm.heartbeat import HEADSTART
from shardembed.errors import CollectiveError

KEY = "shardembed/start"
LOOK_SECONDS = 0.02


def meet(timeout: float) -> tuple[dist.Store, int, int]:
    """A store that holds nothing of an earlier start, this process's rank, and the number of ranks. Collective over the job, whose
    agent, if it has one, this process now ends with.

    Raises:
        CollectiveError: not all ranks came in time.
    """
    lifeline.end_with_agent()
    store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=timeout))))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"{KEY}/{agreed_name(store, rank, world_size, timeout)}", store)
    return store, rank, world_size


def refuse_unjoined() -> None:
    """Ranks that do not join their job would each train tables of their own, and none would ever say so."""
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is not None and world_size != "1":
        raise CollectiveError(
            f"this process is rank {rank} of {world_size} of a job, by RANK and WORLD_SIZE, and has joined no process group: call "
            "se.init() first. To work alone, take these two out of its environment"
        )


def new_group(ranks: list[int], timeout: float, watched: Sequence[str], backend: str | None) -> dist.ProcessGroup:
    """A process group over `ranks`, which connects to nobody yet where the backend is NCCL. Collective over them, in any thread.

    Args:
        watched: types of device that it carries and on which a heartbeat tells more than the backend's own watchdog.
        backend: None for that of the job.
    """
    with _without_a_split():
        made = dist.new_group(ranks, timedelta(seconds=timeout), backend, use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)
    step_back(made, watched, timeout)
    return made


def step_back(group: dist.ProcessGroup, kinds: Sequence[str], timeout: float) -> None:
    """Have the watchdogs of its backends for these types of device, which name nobody, come after a heartbeat of ours."""
    for kind in kinds:
        group._get_backend(torch.device(kind))._set_default_timeout(timedelta(seconds=timeout + HEADSTART))


@contextmanager
def _without_a_split() -> Iterator[None]:
    """Where the job's group is bound to a device, torch makes a new one by splitting the communicator of the job at once. For that
    all ranks of the job have to call, also those that are not to be in it, or the others hang there; and it waits without limit.
    """
    job: Any = dist.distributed_c10d._get_default_group()
    bound, job.bound_device_id = job.bound_device_id, None
    try:
        yield
    finally:
        job.bound_device_id = bound


def agreed_name(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """A name that the ranks of this start agree on, and no others ever did.

    Rank 0 offers a new one, the others answer with a number each, and rank 0 confirms what it got. Offers and confirmations may be
    left from before: a rank believes a confirmation only if it has its own number in it, and looks again until then.
    """
    until = time.monotonic() + timeout
    if rank == 0:
        name = secrets.token_hex(8)
        store.set(KEY, name)
        answers = [f"{KEY}/{name}/{other}" for other in range(1, world_size)]
        _look(lambda: store.check(answers), until, "did not hear from all other ranks", rank)
        store.set(f"{KEY}/{name}/all", json.dumps([store.get(answer).decode() for answer in answers]))
        return name
    mine = secrets.token_hex(8)
    name = ""

    def confirmed() -> bool:
        nonlocal name
        if not store.check([KEY]):
            return False
        offered = store.get(KEY).decode()
        if offered != name:
            name = offered
            store.set(f"{KEY}/{name}/{rank}", mine)
        if not store.check([f"{KEY}/{name}/all"]):
            return False
        numbers = json.loads(store.get(f"{KEY}/{name}/all"))
        return len(numbers) >= rank and numbers[rank - 1] == mine

    _look(confirmed, until, "did not hear from rank 0", rank)
    return name


def _look(found: Callable[[], bool], until: float, problem: str, rank: int) -> None:
    while not found():
        if time.monotonic() > until:
            raise CollectiveError(f"rank {rank} {problem} when the job was to begin: some ranks did not start, or hang")
        time.sleep(LOOK_SECONDS)
