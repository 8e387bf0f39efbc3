"""A few numbers of each rank, told to all in a step, where no counts message says what follows.

What is told is as long for most calls of the kind, and opens with a checksum of all calls so far, so that ranks which make
different ones notice before they exchange what these numbers are the sizes of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.comm.comm import Comm
from shardembed.comm.tag import ROW
from shardembed.errors import SAME_CALLS, DisagreementError

OPENING = 2  # the checksum, and which collection's step it is


def share(comm: Comm, stage: str, numbers: Sequence[int], collection: int, device: torch.device) -> NDArray[np.int64]:
    """Every rank's `numbers`, int64 `[R, n]` in rank order. Collective.

    Args:
        device: of the tensors that they are sizes of. They go the same way, over NCCL where those do: there the order of calls is
            all that keeps them apart, and there are no channels for steps. Host sync on a GPU.

    Raises:
        DisagreementError: on every rank, when they are not making the same call.
    """
    taken = OPENING + len(numbers)
    mine = np.zeros(-(-taken // ROW) * ROW, dtype=np.int64)
    mine[:taken] = comm.history.checksum, collection, *numbers
    sizes = [mine.size] * comm.world_size
    sent = torch.from_numpy(np.tile(mine, comm.world_size)).to(device)
    told = comm.all_to_all("step", stage, sent, sizes, sizes, collection).view(comm.world_size, -1).cpu().numpy()
    if (told[:, :OPENING] != mine[:OPENING]).any():
        raise DisagreementError(_explained(stage, told[:, 1].tolist()))
    return told[:, OPENING:taken]


def _explained(stage: str, collections: Sequence[int]) -> str:
    if len(set(collections)) == 1:
        return f"all ranks came to stage {stage!r}, but not by the same calls. {SAME_CALLS}"
    said = "; ".join(f"rank {rank} is there with collection {number}" for rank, number in enumerate(collections))
    return f"ranks came to stage {stage!r} for different collections: {said}. {SAME_CALLS}"
