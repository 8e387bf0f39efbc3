"""Ids mixed so that they look drawn: in public, for what every rank and every process must agree on, and with a secret, for places
in hash tables, which nobody outside may foresee.

Legend: N ids.
"""

from __future__ import annotations

import secrets
from functools import cache
from typing import NamedTuple

import torch

from shardembed.kernels.grouping import compiled

# The constants of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), as int64.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_2 = 0x94D049BB133111EB - (1 << 64)


class Secret(NamedTuple):
    """What chooses one of many hash functions of an id (`tags_of`); each an int64.

    Attributes:
        flip: bits of the id that are turned over.
        factor_1: what the id is then multiplied by, odd.
        factor_2: likewise, once its halves have been combined.
    """

    flip: int
    factor_1: int
    factor_2: int

    @staticmethod
    def drawn() -> Secret:
        flip, factor_1, factor_2 = (secrets.randbits(64) - (1 << 63) for _ in range(3))
        return Secret(flip, factor_1 | 1, factor_2 | 1)


@cache
def secret() -> Secret:
    """This process's own, so that nobody can choose ids whose places in a hash table are all one. The order of nothing that is
    visible depends on it.
    """
    return Secret.drawn()


def mixed(ids: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer of each id, a bijection: its 64 bits as int64, of the shape of `ids`. The same everywhere, for ever:
    which bucket an id belongs to depends on it.
    """
    ids = (ids ^ shifted(ids, 30)) * MIX_1  # int64 arithmetic wraps as it should
    ids = (ids ^ shifted(ids, 27)) * MIX_2
    return ids ^ shifted(ids, 31)


def shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A logical shift to the right; torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def buckets_of(ids_N: torch.Tensor, buckets: int) -> torch.Tensor:
    """The bucket of each id, from 0 to below `buckets`: by the high half of the mixed id, so that equal shares of all ids fall into
    each. int64 `[N]`.

    Args:
        buckets: from 1 to 2^32.
    """
    if (kernels := compiled(ids_N.device)) is not None:
        return torch.from_numpy(kernels.hashing.buckets_of(ids_N.contiguous().numpy(), buckets))
    return shifted(shifted(mixed(ids_N), 32) * buckets, 32)


def tags_of(ids: torch.Tensor, chosen: Secret) -> torch.Tensor:
    """32 bits of each id that say where it is looked for in a hash table, as int64.

    Without the third product, ids that differ in their high bits alone were an arithmetic progression, which one secret in 300
    put close together.
    """
    ids = (ids ^ chosen.flip) * chosen.factor_1
    ids = (ids ^ shifted(ids, 32)) * chosen.factor_2
    return shifted((ids ^ shifted(ids, 32)) * MIX_2, 32)
