"""Stage 1 of the journey: every accepted input as flat ids, bag lengths and weights.

Accepted for a feature: a tensor of ids; `(ids, offsets)` or `(ids, offsets, weights)`; a nested jagged tensor. For a batch: a
dict of those by feature name, or a TorchRec `KeyedJaggedTensor`.

N: ids of all features together. F: features. Offsets have one entry more than there are bags: they start at 0 and end at
len(ids).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shardembed.errors import DtypeError, FeatureError
from shardembed.inputs.dense import DenseParts
from shardembed.inputs.features import FeatureIds, read_bags, read_feature
from shardembed.inputs.jagged import is_keyed_jagged, split_keyed_jagged
from shardembed.kernels.host import to_host
from shardembed.tables.table_config import Feature

CPU = torch.device("cpu")


@dataclass(frozen=True)
class IdBatch:
    """A batch as the journey takes it, which a collection takes too: made beside the loop, in a worker of a DataLoader for example,
    it saves the main process that work.

    Attributes:
        ids: of all features, one after the other, int64 `[N]`.
        parts: `parts[i]` belongs to feature i of the collection.
        features: what it was read for.
    """

    ids: torch.Tensor
    parts: Sequence[FeatureIds]
    features: tuple[Feature, ...] = ()

    @cached_property
    def _numbers(self) -> NDArray[np.int64]:
        """Of each feature the ids, the bags, and how many ids each bag has or -1 where these differ, int64 `[3, F]`."""
        if isinstance(self.parts, DenseParts):
            return self.parts.numbers
        each = [(part.ids.numel(), part.bags, part.lengths if isinstance(part.lengths, int) else -1) for part in self.parts]
        return np.ascontiguousarray(np.array(each, dtype=np.int64).reshape(-1, 3).T)

    @cached_property
    def sizes(self) -> list[int]:
        """Ids of each feature."""
        return self.sizes_F.tolist()

    @cached_property
    def bags(self) -> list[int]:
        """Bags of each feature."""
        return self.bags_F.tolist()

    @property
    def sizes_F(self) -> NDArray[np.int64]:
        """`sizes` as an array."""
        return self._numbers[0]

    @property
    def bags_F(self) -> NDArray[np.int64]:
        """`bags` as an array."""
        return self._numbers[1]

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """The leading shape of each feature's output."""
        return self.parts.shapes if isinstance(self.parts, DenseParts) else [part.shape for part in self.parts]

    @cached_property
    def lengths_B(self) -> torch.Tensor:
        """Ids of each bag of all features, one feature after the other, int64 `[bags]`."""
        return self.bag_lengths(range(len(self.parts)))

    @cached_property
    def weighted(self) -> tuple[bool, ...]:
        """Whether each feature has weights."""
        if isinstance(self.parts, DenseParts):
            return (False,) * len(self.parts)
        return tuple([part.weights is not None for part in self.parts])

    def bag_lengths(self, features: Sequence[int]) -> torch.Tensor:
        """Ids of each bag of these features, one feature after the other, int64 `[bags]`."""
        _, bags, lengths = self._numbers[:, np.asarray(features, dtype=np.int64)]
        if (lengths < 0).any():
            return torch.cat([self.parts[i].bag_lengths() for i in features])
        return torch.from_numpy(np.repeat(lengths, bags)).to(self.ids.device)

    @staticmethod
    def of(batch: Any, features: Sequence[Feature], device: torch.device = CPU) -> IdBatch:
        """Read any accepted input for a collection's `features`.

        Raises:
            InputError: as `read_features`; and the batch is an IdBatch of other features.
        """
        if isinstance(batch, IdBatch):
            if batch.features is not features and batch.features != tuple(features):
                raise FeatureError(
                    f"the IdBatch was read for the features {_keys(batch.features)}, but is looked up for {_keys(features)}; make "
                    "it with IdBatch.of(batch, emb.features) of this collection"
                )
            return batch if batch.ids.device == device else batch.to(device, non_blocking=batch.ids.is_pinned())
        if type(batch) is dict and len(batch) == len(features):
            usual = _usual(batch, features, device) or _usual_bags(batch, features, device)
            if usual is not None:
                return usual
        return IdBatch.join(read_features(batch, features, device), tuple(features))

    @staticmethod
    def join(parts: tuple[FeatureIds, ...], features: tuple[Feature, ...] = ()) -> IdBatch:
        flat = [part.ids for part in parts]
        ids = torch.cat(flat) if len(flat) > 1 else flat[0]
        return IdBatch(ids.to(torch.int64), parts, features)

    @staticmethod
    def of_bags(
        ids: Any,
        offsets: Any,
        weights: Any,
        include_last_offset: bool,
        feature: Feature,
        device: torch.device,
        last_takes_rest: bool = True,
    ) -> IdBatch:
        """Read `nn.EmbeddingBag`'s arguments: ids `[B, L]`, or ids `[n]` with offsets `[B]` (`[B + 1]` with
        `include_last_offset`). Nested ids take nested weights.

        Args:
            last_takes_rest: ids behind the last offset belong to the last bag; else they are refused.

        Raises:
            InputError, DtypeError, OffsetsError: as `of`.
        """
        part = read_bags(ids, offsets, weights, include_last_offset, feature, device, last_takes_rest)
        return IdBatch.join((part,))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> IdBatch:
        """The same batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> IdBatch:
        """The same batch in pinned host memory, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> IdBatch:
        ids = change(self.ids)
        if isinstance(self.parts, DenseParts):
            return IdBatch(ids, self.parts.of(ids), self.features)

        def moved(part: FeatureIds, piece: torch.Tensor) -> FeatureIds:
            lengths = change(part.lengths) if isinstance(part.lengths, torch.Tensor) else part.lengths
            weights = None if part.weights is None else change(part.weights)
            # The ids of all features are those of the parts, so what has been moved once is cut rather than moved again.
            return part._replace(ids=piece if part.ids.dtype == ids.dtype else change(part.ids), lengths=lengths, weights=weights)

        parts = zip(self.parts, ids.split(self.sizes), strict=True)
        return IdBatch(ids, tuple(moved(part, piece) for part, piece in parts), self.features)


def read_features(batch: Any, features: Sequence[Feature], device: torch.device) -> tuple[FeatureIds, ...]:
    """Each feature's part of any accepted input.

    Raises:
        FeatureError: a feature is missing or unknown.
        DtypeError: ids are not int32 or int64, weights are not floating point, or a value is no tensor.
        OffsetsError: offsets do not describe the ids.
        InputError: a shape that the feature's pooling cannot take.
    """
    if is_keyed_jagged(batch):
        batch = split_keyed_jagged(batch)
    if not isinstance(batch, Mapping):
        raise DtypeError(
            f"a batch must be a dict of tensors by feature or a KeyedJaggedTensor, not {type(batch).__name__}; "
            f"the features are {_keys(features)}"
        )
    _check_names(batch, features)
    return tuple(read_feature(batch[feature.key], feature, device) for feature in features)


def _usual(batch: dict[str, Any], features: Sequence[Feature], device: torch.device) -> IdBatch | None:
    """What `_dense` would read, with little work a feature, of int64 ids `[B]` or `[B, L]` on the device; None for any other
    batch, at fault or not.
    """
    given: list[torch.Tensor] = []
    for feature in features:
        ids = batch.get(feature.key)
        # An equal device with another number is left to the long way.
        if type(ids) is not torch.Tensor or ids.dtype is not torch.int64 or ids.is_nested or ids.device != device:
            return None
        given.append(ids)
    shapes = [ids.shape for ids in given]
    found = set(shapes)
    if not all(0 < len(shape) < 3 for shape in found):
        return None
    # torch.cat takes what differs in the first dimension only.
    if len({shape[1:] for shape in found}) > 1:
        given = [ids.reshape(-1) for ids in given]
    ids = (torch.cat(given) if len(given) > 1 else given[0]).reshape(-1)
    return IdBatch(ids, DenseParts(ids, shapes, features), tuple(features))


def _usual_bags(batch: dict[str, Any], features: Sequence[Feature], device: torch.device) -> IdBatch | None:
    """As `_usual`, of int64 `(ids [n], offsets [B + 1])`, as many offsets for each feature: they are checked all at once."""
    given, offsets = [], []
    for feature in features:
        pair = batch.get(feature.key)
        if type(pair) is not tuple or len(pair) != 2:
            return None
        for tensor in pair:
            plain = type(tensor) is torch.Tensor and tensor.dtype is torch.int64 and tensor.dim() == 1 and not tensor.is_nested
            if not plain or tensor.device != device:
                return None
        given.append(pair[0])
        offsets.append(pair[1])
    if not offsets or len({each.numel() for each in offsets}) > 1 or not offsets[0].numel():
        return None
    sizes, offsets_FB = [ids.numel() for ids in given], torch.stack(offsets)
    bags = offsets_FB.shape[1] - 1
    falls = (offsets_FB[:, 1:] < offsets_FB[:, :-1]).sum(1, keepdim=True)  # and no length below 0: one may have wrapped around
    firsts, lasts, falling = to_host(torch.cat([offsets_FB[:, :1], offsets_FB[:, -1:], falls], 1)).T
    if firsts.any() or lasts.tolist() != sizes or falling.any():
        return None
    lengths_FB = offsets_FB.diff(dim=1)
    ids = torch.cat(given) if len(given) > 1 else given[0]
    shapes = [(size,) if feature.pooling is None else (bags,) for size, feature in zip(sizes, features, strict=True)]
    return IdBatch(ids, tuple(map(FeatureIds, ids.split(sizes), lengths_FB.unbind(0), shapes)), tuple(features))


def _keys(features: Sequence[Feature]) -> list[str]:
    """What a batch is to name, each once: a feature may be looked up in several tables."""
    return list(dict.fromkeys(feature.key for feature in features))


def _check_names(batch: Mapping[str, Any], features: Sequence[Feature]) -> None:
    names = _keys(features)
    known = set(names)
    for given in batch:
        if given not in known:
            near = difflib.get_close_matches(str(given), names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise FeatureError(f"unknown feature {given!r}{hint} The features are {names}")
    missing = [name for name in names if name not in batch]
    if missing:
        raise FeatureError(f"the batch lacks feature(s) {missing}; pass an empty tensor of ids where there are none")
