"""Entries of one slab to segments: those of one owner side by side, and of them those of one bag.

Legend: E entries (a key in a segment), S segments, B bags, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shardembed.kernels.grouping import compiled, stable_order


@dataclass(frozen=True)
class Segments:
    """What to ask of each owner.

    Attributes:
        keys_E: grouped by owner.
        lengths_S: keys of each segment, or None when each has one.
        counts: segments and keys that go to each rank, int64 `[2, R]`.
        segment_of_single: the segments of the entries that are one each.
        bag_segments, bag_starts: the segments of each bag, `[sum of bags]` starts; None where bag b is segment b.
    """

    keys_E: torch.Tensor
    lengths_S: torch.Tensor | None
    counts: torch.Tensor
    segment_of_single: torch.Tensor
    bag_segments: torch.Tensor | None = None
    bag_starts: torch.Tensor | None = None


def segment(
    owner_E: torch.Tensor, key_E: torch.Tensor, singles: int, lengths_B: torch.Tensor, world_size: int, lone_owner: int | None
) -> Segments:
    """The first `singles` entries are segments of their own; of the others, which belong to bags of `lengths_B`, those with one
    owner and one bag are.

    Args:
        lone_owner: who owns all that there is, if that is one rank.
    """
    if lone_owner is not None and not (singles and lengths_B.numel()) and bool((lengths_B > 0).all()):
        return _of_one_owner(key_E, singles, lengths_B, world_size, lone_owner)
    if (kernels := compiled(key_E.device)) is not None:
        found = kernels.routing.segment(owner_E.numpy(), key_E.numpy(), singles, lengths_B.numpy(), world_size)
        keys_E, lengths_S, counts, of_single, bag_segments, bag_starts = map(torch.from_numpy, found)
        return Segments(
            keys_E,
            lengths_S if lengths_B.numel() else None,
            counts,
            of_single,
            *((bag_segments, bag_starts) if lengths_B.numel() else (None, None)),
        )
    return _segment(owner_E, key_E, singles, lengths_B, world_size)


def _of_one_owner(key_E: torch.Tensor, singles: int, lengths_B: torch.Tensor, world_size: int, owner: int) -> Segments:
    """Only singles, or only bags and none of them empty: nothing has to move."""
    bags = lengths_B.numel()
    counts = key_E.new_zeros(2, world_size)
    counts[:, owner] = torch.tensor([bags or singles, key_E.numel()])
    return Segments(key_E, lengths_B if bags else None, counts, torch.arange(singles, device=key_E.device))


def _segment(owner_E: torch.Tensor, key_E: torch.Tensor, singles: int, lengths_B: torch.Tensor, world_size: int) -> Segments:
    """In plain torch."""
    device, bags = owner_E.device, lengths_B.numel()
    sorting = stable_order(owner_E, world_size)
    bag_of_entry = torch.repeat_interleave(lengths_B, output_size=owner_E.numel() - singles)
    groups = torch.cat([torch.arange(singles, device=device), bag_of_entry + singles])[sorting]
    owners = owner_E[sorting]
    begins = torch.ones_like(owners, dtype=torch.bool)
    begins[1:] = (owners[1:] != owners[:-1]) | (groups[1:] != groups[:-1])
    first_S = begins.nonzero().squeeze(1)  # host sync on a GPU: the number of segments
    segment_E = torch.empty_like(sorting)
    segment_E[sorting] = begins.cumsum(0) - 1
    keys = torch.bincount(owners, minlength=world_size)
    if not bags:
        return Segments(key_E[sorting], None, torch.stack([keys, keys]), segment_E)
    group_S = groups[first_S]
    bag_segments = stable_order(group_S, singles + bags)[singles:]
    per_bag = torch.bincount(group_S[bag_segments] - singles, minlength=bags)
    return Segments(
        key_E[sorting],
        torch.cat([first_S, first_S.new_tensor([owners.numel()])]).diff(),
        torch.stack([torch.bincount(owners[first_S], minlength=world_size), keys]),
        segment_E[:singles],
        bag_segments,
        per_bag.cumsum(0) - per_bag,
    )
