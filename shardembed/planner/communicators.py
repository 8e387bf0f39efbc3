"""What NCCL's communicators take of a GPU: an estimate, from what NCCL allocates by default. `se.memory` says what they took.

- All-to-alls connect each GPU with each of its node by as many channels as `NCCL_MAX_P2P_NCHANNELS` allows, 32, and each channel to
  each peer has buffers of 10 and of 2 MiB: seen with NCCL's log on eight H100, whose first all-to-all took 3.28 GB
  (github.com/NVIDIA/nccl, issue 1685).
- What goes to other nodes shares one buffer (issue 1450), of 512 MiB, which is there on one node as well (issue 2363, NCCL 2.28).

For eight GPUs a node that is 3.36 GB a communicator, however many nodes there are.
"""

from __future__ import annotations

COMMUNICATORS = 2  # for forwards, and for the rest: `comm.communicators.Communicators`
CHANNELS = 32
CHANNEL_BYTES = 12 << 20
SHARED_BYTES = 512 << 20


def communicator_bytes(ranks: int, ranks_per_node: int) -> int:
    """Bytes of a rank's GPU that the communicators of a job take; 0 of a job of one rank, which has none."""
    if ranks == 1:
        return 0
    peers = min(ranks, ranks_per_node) - 1
    return COMMUNICATORS * (peers * CHANNELS * CHANNEL_BYTES + SHARED_BYTES)
