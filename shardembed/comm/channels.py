"""The process groups of a Comm over Gloo: some of each kind, each of them a channel. On a job without GPUs all calls go by them; on
one with GPUs those whose tensors lie in host memory, beside the two `communicators`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from shardembed.comm.diagnosis import STORE_SECONDS, UnansweredError, lost_store, within
from shardembed.comm.rendezvous import new_group
from shardembed.errors import CollectiveError

Group = Literal["forward", "backward", "step", "control"]
Channels = dict[tuple[Group, int], dist.ProcessGroup]
# How many there are of each kind. Messages that lie so many numbers apart go by the same one.
CHANNELS: dict[Group, int] = {"forward": 1, "backward": 4, "step": 4, "control": 1}
SPEECH: dict[Group, int] = {"forward": 1, "control": 1}  # what counts and texts go by: all there is beside NCCL, or a main thread
CONTROL: dict[Group, int] = {"control": 1}


def open_channels(
    group: dist.ProcessGroup | None, rank: int, counts: Mapping[Group, int], watched: Sequence[str], timeout: float
) -> Channels:
    """New process groups over the ranks of `group`. Collective over them.

    Args:
        rank: this one's, for messages.
        counts: of the channels of each kind.
        watched: types of device on which a heartbeat tells more than the backend's own watchdog.

    Raises:
        CollectiveError: some ranks do not take part, or their store is lost.
    """
    ranks = dist.get_process_group_ranks(group)
    # The job may have been started with NCCL alone, which cannot carry what lies in host memory.
    backend = "gloo" if torch.cuda.is_available() else None
    on_host = [kind for kind in watched if kind == "cpu"]
    began = time.monotonic()
    made: Channels = {}
    keys: list[tuple[Group, int]] = [(kind, channel) for kind, count in counts.items() for channel in range(count)]
    try:
        for key in keys:
            made[key] = within(timeout + STORE_SECONDS, partial(new_group, ranks, timeout, on_host, backend))
    except RuntimeError as error:
        close_channels(made)
        # Torch has no time limit for a store that does not answer.
        why = lost_store("silent") if isinstance(error, UnansweredError) else f"Cause: {str(error).splitlines()[0]}"
        where = f"to make process groups with the ranks {ranks if len(ranks) < 9 else f'({len(ranks)} of them)'}"
        raise CollectiveError(f"rank {rank} waited {time.monotonic() - began:.1f} s {where}. {why}") from error
    return made


def sockets_a_peer(over_nccl: bool) -> int:
    """Sockets that a rank has open for each other rank, beside NCCL's own: one a group over Gloo. These are the job's group, the
    channels of a Comm, those of the Comm beside it that `prefetched` uses, and that of the one which saves.
    """
    return 1 + sum((SPEECH if over_nccl else CHANNELS).values()) + sum(SPEECH.values()) + sum(CONTROL.values())


def close_channels(channels: Channels) -> None:
    """Leave these process groups; there are none afterwards."""
    while channels:
        _, group = channels.popitem()
        if group in dist.distributed_c10d._world.pg_map:  # else the job's groups were destroyed altogether
            dist.destroy_process_group(group)
