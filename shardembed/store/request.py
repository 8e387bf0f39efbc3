"""What an owner is asked: the keys of a forward call, by slab and asking rank, and the sizes of the answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from shardembed.wire.message import MessageLayout


@dataclass(frozen=True)
class SlabRequest:
    """What a rank is asked of one slab by all ranks, in rank order.

    Attributes:
        keys_E: rows asked for, int32 or int64 `[E]`.
        offsets: where each segment's keys begin, int64 `[S + 1]`, or None when each has one key.
        multiplicities_E: how often each key's id occurs in the asking rank's batch, int32 `[E]`; None where the slab does not scale
            by frequency.
    """

    keys_E: torch.Tensor
    offsets: torch.Tensor | None
    multiplicities_E: torch.Tensor | None


@dataclass(frozen=True)
class Request:
    """What all ranks ask of this one, and what it has asked of them.

    Attributes:
        slabs: what is asked of each.
        answers: the message of vectors for those who ask, one a segment.
        vectors: the message of vectors that this rank has asked for.
        call: the number of the forward call.
        ahead: asked beside the main thread's calls.
    """

    slabs: tuple[SlabRequest, ...]
    answers: MessageLayout
    vectors: MessageLayout
    call: int
    ahead: bool = False

    def __iter__(self) -> Iterator[SlabRequest]:
        return iter(self.slabs)

    def __getitem__(self, slab: int) -> SlabRequest:
        return self.slabs[slab]
