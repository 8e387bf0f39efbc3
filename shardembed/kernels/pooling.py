"""The way back through pooling: gradients of bags to gradients of segments, which is a lookup itself: the bags of each segment,
summed. Torch's own (2.13, on the CPU) takes three times as long. On a CPU it is compiled where Numba is installed.

Legend: N entries (a segment in a bag), S segments, B bags, W columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shardembed.kernels.grouping import compiled, stable_order


@dataclass(frozen=True)
class BagsOf:
    """Which bags each segment is in, where a GPU's route knows it already.

    Attributes:
        bags_N: one segment after the other, in the order of its entries.
        starts: where those of each segment begin, and the end, `[S + 1]`; None where each is in one bag.
    """

    bags_N: torch.Tensor
    starts: torch.Tensor | None


def lengths_of(starts: torch.Tensor, entries: int) -> torch.Tensor:
    """How many of so many entries belong to each of several neighbours, of which the last one ends with them; int64."""
    return torch.cat([starts, starts.new_full((1,), entries)]).diff()


def spread(
    segments_N: torch.Tensor,
    starts_B: torch.Tensor,
    grads_BW: torch.Tensor,
    count: int,
    once: bool = False,
    bags_of: BagsOf | None = None,
) -> torch.Tensor:
    """The sum of the gradients of the bags that each of `count` segments is in, `[S, W]`, in the order of its entries.

    Args:
        starts_B: where each bag's entries begin; the last one ends with them.
        once: no segment is in two bags.
        bags_of: the same, the other way round.
    """
    if bags_of is not None:
        from shardembed.kernels.triton.lookup import lookup  # Triton may be absent

        return lookup(grads_BW.detach().contiguous(), bags_of.bags_N, bags_of.starts, grads_BW.dtype)
    if (kernels := compiled(grads_BW.device)) is not None:
        grads_BW = grads_BW.detach().contiguous()
        grads_SW = torch.empty(count, grads_BW.shape[1], dtype=grads_BW.dtype)
        kernels.pooling.spread(segments_N.numpy(), starts_B.numpy(), grads_BW.numpy(), grads_SW.numpy())
        return grads_SW
    lengths_B = lengths_of(starts_B, segments_N.numel())
    bags_N = torch.repeat_interleave(lengths_B, output_size=segments_N.numel())
    if once:
        return grads_BW.new_zeros(count, grads_BW.shape[1]).index_copy_(0, segments_N, grads_BW.index_select(0, bags_N))
    counts_S = torch.bincount(segments_N, minlength=count)
    bags_N = bags_N[stable_order(segments_N, count)]
    return F.embedding_bag(bags_N, grads_BW.contiguous(), counts_S.cumsum(0) - counts_S, mode="sum")
