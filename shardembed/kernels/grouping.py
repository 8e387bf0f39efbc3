"""Which of many numbers are equal: the bookkeeping below routes, merges and adjoints. On a CPU it is compiled where Numba is
installed, elsewhere it is torch's; both give the same numbers.

Legend: E entries, U distinct numbers, S segments.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from shardembed.config.collector import uncollected
from shardembed.kernels.gradients import Gradients

WORD = 63  # bits; as in `kernels.numba.ordering`


@dataclass(frozen=True)
class Groups:
    """Equal numbers together.

    Attributes:
        numbers_U: the distinct ones, ascending, int64 `[U]`.
        starts: where each group begins in `order_E`, int64 `[U + 1]`.
        order_E: the entries, group by group and in each as they stood, int64 `[E]`.
    """

    numbers_U: torch.Tensor
    starts: torch.Tensor
    order_E: torch.Tensor

    def counts(self) -> torch.Tensor:
        """The size of each group, `[U]`."""
        return self.starts.diff()

    def inverse(self) -> torch.Tensor:
        """The number of each entry's group, `[E]`."""
        if (kernels := compiled(self.order_E.device)) is not None:
            return torch.from_numpy(kernels.ordering.inverse_of(self.order_E.numpy(), self.starts.numpy()))
        inverse = torch.empty_like(self.order_E)
        groups = torch.arange(self.numbers_U.numel(), device=inverse.device)
        inverse[self.order_E] = torch.repeat_interleave(groups, self.counts(), output_size=inverse.numel())
        return inverse


@dataclass(frozen=True)
class Kernels:
    """The compiled modules.

    Attributes:
        hashing: ids to numbers, by hash tables.
        ordering: which of many numbers are equal.
        packing: tensors into messages and out of them.
        placing: newcomers to places in full buckets.
        pooling: gradients of bags to those of their segments.
        routing: ids to owners and keys.
        starting: what rows of dynamic tables begin with.
        texts: hashes of texts.
        updating: merged gradients to new weights.
    """

    hashing: Any
    ordering: Any
    packing: Any
    placing: Any
    pooling: Any
    routing: Any
    starting: Any
    texts: Any
    updating: Any


@cache
def missing() -> str | None:
    """Why there are no compiled kernels on this machine's CPU, or None when there are."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    try:
        _load()
    except (ImportError, OSError, AttributeError) as error:
        return f"numba does not load here: {error}"
    return None


@cache
def _load() -> Kernels:
    with uncollected():
        from shardembed.kernels.numba import hashing, ordering, packing, placing, pooling, routing, starting, texts, updating

    return Kernels(hashing, ordering, packing, placing, pooling, routing, starting, texts, updating)


def compiled(device: torch.device) -> Kernels | None:
    """The compiled kernels, where tensors on `device` can go through them."""
    return None if device.type != "cpu" or missing() else _load()


def sorts(count: int, limit: int) -> bool:
    """A number and its place fit one word."""
    return count.bit_length() + limit.bit_length() <= WORD


def stable_order(numbers: torch.Tensor, limit: int) -> torch.Tensor:
    """The order that sorts `numbers`, all from 0 to below `limit`, and keeps equal ones as they stand; int64."""
    kernels = compiled(numbers.device)
    if kernels is not None and sorts(numbers.numel(), limit):
        return torch.from_numpy(kernels.ordering.stable_order(numbers.contiguous().numpy(), limit))
    # 32-bit keys sort in half the time.
    narrow = limit <= torch.iinfo(torch.int32).max
    return torch.argsort(numbers.to(torch.int32) if narrow else numbers, stable=True)


def group(numbers: torch.Tensor, limit: int) -> Groups:
    """Group `numbers`, all from 0 to below `limit`. Host sync on a GPU: how many distinct ones there are."""
    kernels = compiled(numbers.device)
    if kernels is not None and sorts(numbers.numel(), limit):
        return _group(kernels, numbers, None, limit)
    order = stable_order(numbers, limit)
    numbers_U, counts = torch.unique_consecutive(numbers[order], return_counts=True)
    return Groups(numbers_U, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), order)


def _group(kernels: Kernels, numbers: torch.Tensor, offsets: torch.Tensor | None, limit: int) -> Groups:
    found = kernels.ordering.group(numbers.contiguous().numpy(), segments_of(offsets), limit)
    return Groups(*(torch.from_numpy(part) for part in found))


def segments_of(offsets: torch.Tensor | None) -> NDArray[np.int64]:
    """Offsets as compiled kernels take them: none where every segment is a single entry."""
    return np.empty(0, np.int64) if offsets is None else offsets.numpy()


def group_rows(waiting: Gradients, rows: int) -> Groups:
    """Group the rows that gradients wait for, in a slab of so many; `order_E` names not entries but their segments."""
    if waiting.offsets is None:
        return group(waiting.rows_E, rows)
    kernels = compiled(waiting.rows_E.device)
    if kernels is not None and waiting_sorts(waiting, rows):
        return _group(kernels, waiting.rows_E, waiting.offsets, rows)
    groups = group(waiting.rows_E, rows)
    segments = torch.repeat_interleave(waiting.offsets.diff(), output_size=groups.order_E.numel())
    return Groups(groups.numbers_U, groups.starts, segments[groups.order_E])


def waiting_sorts(waiting: Gradients, rows: int) -> bool:
    """As `sorts`, of a row and its segment."""
    return sorts(max(waiting.rows_E.numel(), 0 if waiting.offsets is None else waiting.offsets.numel()), rows)


def merge(waiting: Gradients, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct rows `[U]`, ascending, and the sum of the gradients of each, `[U, W]`, in a slab of `rows` rows.

    Sums follow the order of arrival, so they are the same however often they are made.
    """
    groups = group_rows(waiting, rows)
    return groups.numbers_U, F.embedding_bag(groups.order_E, waiting.grads_SW, groups.starts, mode="sum", include_last_offset=True)
