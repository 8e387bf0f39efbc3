"""TorchRec's `KeyedJaggedTensor`, read without importing TorchRec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from shardembed.errors import OffsetsError


@dataclass(frozen=True)
class Jagged:
    """What a KeyedJaggedTensor holds for one key.

    Attributes:
        ids: `[n]`.
        lengths: of the bags, `[bags]`, known to describe the ids.
        weights: `[n]`, or None.
    """

    ids: torch.Tensor
    lengths: torch.Tensor
    weights: torch.Tensor | None


def is_keyed_jagged(batch: Any) -> bool:
    """The batch is a TorchRec KeyedJaggedTensor."""
    # By name, so that TorchRec is imported only by those who use it.
    return type(batch).__name__ == "KeyedJaggedTensor" and type(batch).__module__.startswith("torchrec")


def split_keyed_jagged(batch: Any) -> dict[str, Jagged]:
    """What the batch holds, by key.

    Raises:
        OffsetsError: its lengths do not describe its values.
    """
    # Not by its to_dict(), which fails on a batch without bags (TorchRec 1.8): one rank's may be empty.
    lengths, values, weights = batch.lengths().view(-1), batch.values(), batch.weights_or_none()
    if lengths.numel() and int(lengths.min()) < 0:  # host sync on a GPU
        raise OffsetsError(f"a KeyedJaggedTensor has the length {int(lengths.min())}; lengths must not be negative")
    counts = batch.length_per_key()  # host sync on a GPU
    if sum(counts) != values.numel():
        raise OffsetsError(f"the lengths of a KeyedJaggedTensor add up to {sum(counts)}, but it has {values.numel()} values")
    bags = batch.stride_per_key()
    if sum(bags) != lengths.numel():
        raise OffsetsError(f"a KeyedJaggedTensor has {lengths.numel()} lengths for {len(bags)} keys with {sum(bags)} bags in all")
    parts = [lengths.split(bags), values.split(counts), [None] * len(counts) if weights is None else weights.split(counts)]
    return {key: Jagged(ids, length, weight) for key, length, ids, weight in zip(batch.keys(), *parts, strict=True)}
