"""What is known of a batch of tensors without looking at its features one by one.

F: features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.inputs.features import FeatureIds
from shardembed.tables.table_config import Feature


class DenseParts(Sequence[FeatureIds]):
    """The parts of a batch whose features are all given as `[B]` or `[B, L]`. They are cut when the first of them is asked for: a
    step can do without, and to make 800 of them takes as long as to route their ids.

    Args:
        ids: of all features, one after the other, int64 `[N]`.
        shapes: in which each feature's were given.
        features: what they are read for.
    """

    def __init__(self, ids: torch.Tensor, shapes: Sequence[tuple[int, ...]], features: Sequence[Feature]) -> None:
        self._ids, self._given, self._features = ids, shapes, features

    def of(self, ids: torch.Tensor) -> DenseParts:
        """The same parts of the same ids in other memory."""
        return DenseParts(ids, self._given, self._features)

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """Of each feature how many ids and bags there are, and how many ids in each bag, int64 `[3, F]`."""
        shapes = self._given[:1] if len(set(self._given)) == 1 else self._given  # most batches have one
        bags = np.array([shape[0] for shape in shapes], dtype=np.int64)
        wide = np.array([shape[1] if len(shape) == 2 else 1 for shape in shapes], dtype=np.int64)
        each = np.array([feature.pooling is None for feature in self._features])  # an id is a bag
        return np.stack(np.broadcast_arrays(bags * wide, bags, np.where(each, 1, wide)))

    @cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The leading shape of each feature's output."""
        given = zip(self._given, self._features, strict=True)
        return [tuple(shape) if feature.pooling is None else tuple(shape[:1]) for shape, feature in given]

    @cached_property
    def _cut(self) -> list[FeatureIds]:
        sizes, _, lengths = self.numbers.tolist()
        return list(map(FeatureIds, self._ids.split(sizes), lengths, self.shapes))

    def __len__(self) -> int:
        return len(self._given)

    @overload
    def __getitem__(self, index: int) -> FeatureIds: ...
    @overload
    def __getitem__(self, index: slice) -> list[FeatureIds]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._cut[index]
