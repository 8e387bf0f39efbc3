"""What rank 0 keeps of the ids of training, in bounded memory and next to no time: some ids of some batches, spread evenly.

Of every feature at most `BATCHES` parts of at most `IDS` ids. When they are all taken, every second one is dropped, and from
then on half as many steps are looked at. Ranks are dealt alike parts of each batch, so that one of them stands for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from shardembed.inputs.ids import IdBatch
from shardembed.tables.table_config import Feature

BATCHES, IDS = 64, 1024
TOP = (1, 10, 100, 1000)  # most frequent rows whose share of the lookups is given
RESERVED = 0  # the row of missing and unknown values, where a job has such a row


class IdSample:
    """Watches the calls of a collection's module while `watching`."""

    def __init__(self, module: nn.Module, features: Iterable[Feature]) -> None:
        self._features = tuple(features)
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._seen, self._every, self._open = 0, 1, False
        self._hook = module.register_forward_pre_hook(self._look)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """One training step."""
        self._open = self._seen % self._every == 0
        self._seen += 1
        try:
            yield
        finally:
            self._open = False
        if max(map(len, self._parts.values()), default=0) >= BATCHES:
            self._parts = {name: parts[::2] for name, parts in self._parts.items()}
            self._every *= 2

    def close(self) -> None:
        self._hook.remove()

    def _look(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not self._open:
            return
        for name, ids in _ids_of(arguments[0] if arguments else None, self._features):
            ids = ids.detach().reshape(-1)
            ids = ids[:: max(1, -(-len(ids) // IDS))]
            self._parts.setdefault(name, []).append(ids.clone())  # on its device: nothing waits for it here

    def found(self) -> dict[str, dict[str, Any]]:
        """`statistics` of each feature that had ids."""
        return {name: statistics(torch.cat(parts).cpu().numpy()) for name, parts in self._parts.items() if any(map(len, parts))}


def _ids_of(batch: Any, features: tuple[Feature, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, ids) of each feature of a batch as a collection takes it; nothing of those that are in TorchRec's types."""
    batch = getattr(batch, "batch", batch)  # of a prefetched one
    if isinstance(batch, IdBatch):
        yield from ((feature.key, part.ids) for feature, part in zip(features, batch.parts, strict=True))
    elif isinstance(batch, Mapping):
        for name, given in batch.items():
            ids = given[0] if isinstance(given, tuple) else given
            if isinstance(ids, torch.Tensor):
                yield name, ids.values() if ids.is_nested else ids


def statistics(ids: np.ndarray) -> dict[str, Any]:
    """Of sampled lookups: how many, distinct ids, the share of the most frequent ones and of the reserved row; and by how often an
    id occurs (once, 2 to 3 times, 4 to 7, ...) how many ids do, and their lookups.
    """
    found, counts = np.unique(ids, return_counts=True)
    falling = np.sort(counts)[::-1].cumsum()
    doublings = np.floor(np.log2(counts)).astype(np.int64)
    return {
        "lookups": len(ids),
        "distinct": len(found),
        "top": {str(most): float(falling[min(most, len(falling)) - 1] / len(ids)) for most in TOP},
        "reserved": float(counts[found == RESERVED].sum() / len(ids)),
        "ids_by_hits": np.bincount(doublings).tolist(),
        "lookups_by_hits": np.bincount(doublings, counts).astype(np.int64).tolist(),
    }
