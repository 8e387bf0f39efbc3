"""Loaders for training loops over several ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from shardembed.comm.comm import Comm
from shardembed.errors import DataError

Batch = TypeVar("Batch")
READY, ENDED, FAILED = 0, 1, 2


def synced(loader: Iterable[Batch], comm: Comm | None = None) -> Iterator[Batch]:
    """The loader's batches, for as long as every rank has one. Collective: one scalar all-reduce a batch.

    Ranks may have different numbers of batches: all of them stop when the first one runs out, and what the others have left is
    not read. A loader that raises on one rank ends the loop on all.

    Raises:
        DataError: on the ranks whose own loader worked; the failing rank raises its own error.
    """
    comm = comm or Comm.of()
    batches = None
    while True:
        state, batch, trouble = READY, None, None
        try:
            batches = iter(loader) if batches is None else batches
            batch = next(batches)
        except StopIteration:
            state = ENDED
        except Exception as error:  # whatever a user's loader raises: the others must hear of it before it goes on
            state, trouble = FAILED, error
        # Failed outweighs ended outweighs ready; the rank that failed rides along in the fraction.
        said = torch.tensor([state + (comm.rank + 1) / 2**20 if state == FAILED else state], dtype=torch.float64)
        worst = float(comm.all_reduce("synced: agree on the end of data", said, maximum=True))
        if trouble is not None:
            raise trouble
        if worst >= FAILED:
            rank = round((worst - FAILED) * 2**20) - 1
            raise DataError(f"the data loader of rank {rank} failed; its own error says why. All ranks stop here")
        if worst >= ENDED:
            return
        yield batch  # type: ignore[misc]
