"""Ids to small numbers: the distinct ids of a batch, numbered, so that what follows need not know how large an id may be. On a CPU
it is one compiled pass where Numba is installed, elsewhere it is torch's sort.

Legend: N ids, U distinct ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shardembed.errors import UnsupportedError
from shardembed.kernels.grouping import compiled
from shardembed.kernels.mixing import secret

MOST = 2**31  # numbers that a word of the hash table can hold
LEAST_WORDS = 16


@dataclass(frozen=True)
class Interned:
    """The distinct ids of a batch.

    Attributes:
        ids_U: each once, int64 `[U]`; in the order in which they first occur where Numba serves, else ascending.
        numbers_N: of each id its number in `ids_U`, int64 `[N]`.
        counts_U: how often each occurs, int64 `[U]`.
    """

    ids_U: torch.Tensor
    numbers_N: torch.Tensor
    counts_U: torch.Tensor


def intern(ids_N: torch.Tensor, first: int | None = None) -> Interned:
    """Number the distinct ones of these ids, any int64. Host sync on a GPU: how many there are.

    Args:
        ids_N: int64 `[N]`.
        first: an id that gets number 0 whether it occurs (padding, say) or not; its count may be 0.

    Raises:
        UnsupportedError: there are 2^31 ids or more.
    """
    if ids_N.numel() >= MOST:
        raise UnsupportedError(f"a batch of {ids_N.numel():,} ids cannot be numbered: at most {MOST - 1:,} can, so make it smaller")
    if (kernels := compiled(ids_N.device)) is not None:
        ahead = np.array([] if first is None else [first], dtype=np.int64)
        words = torch.full((words_of(ids_N.numel() + ahead.size),), -1, dtype=torch.int64)
        found = kernels.hashing.intern(words.numpy(), ids_N.contiguous().numpy(), ahead, tuple(secret()))
        return Interned(*(torch.from_numpy(part) for part in found))
    if first is None:
        return Interned(*torch.unique(ids_N, return_inverse=True, return_counts=True))
    return _first_of_all(torch.cat([ids_N.new_full((1,), first), ids_N]))


def words_of(entries: int) -> int:
    """The size of a table for at most so many; searches are short as long as a third is empty, and shorter with more."""
    return max(LEAST_WORDS, 2 * entries)


def _first_of_all(ids_N: torch.Tensor) -> Interned:
    """Number the ids behind the first one, which gets number 0; the others follow, ascending."""
    ids_U, numbers_N, counts_U = torch.unique(ids_N, return_inverse=True, return_counts=True)
    place = numbers_N[0]
    order_U = torch.arange(ids_U.numel(), device=ids_U.device)
    order_U = torch.where(order_U == 0, place, order_U - (order_U <= place).to(torch.int64))
    numbers_N = torch.where(numbers_N == place, 0, numbers_N + (numbers_N < place).to(torch.int64))
    counts_U = counts_U[order_U]
    counts_U[0] -= 1
    return Interned(ids_U[order_U], numbers_N[1:], counts_U)
