"""Stage 1 of the journey, one feature at a time: ids, bag lengths and weights out of whatever form is accepted.

Accepted for a feature: a tensor of ids; `(ids, offsets)` or `(ids, offsets, weights)`; a nested jagged tensor; what `Collate` or
TorchRec made of either (`Jagged`). Offsets have one entry more than there are bags: they start at 0 and end at len(ids).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from shardembed.errors import DtypeError, InputError, OffsetsError
from shardembed.inputs.jagged import Jagged
from shardembed.tables.pooling import POOLINGS, WEIGHTED
from shardembed.tables.table_config import Feature

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # offsets; ids are int64 or int32, as in torch


class FeatureIds(NamedTuple):  # and no dataclass: 800 features are as many of them a step
    """One feature's part of a batch.

    Attributes:
        ids: int64 or int32 `[n]`.
        lengths: ids of each bag, int64 `[bags]`, or the one length that all bags have.
        shape: the output's leading shape, `(bags,)` when pooled.
        weights: of the ids, `[n]`, or None.
    """

    ids: torch.Tensor
    lengths: torch.Tensor | int
    shape: tuple[int, ...]
    weights: torch.Tensor | None = None

    @property
    def bags(self) -> int:
        if isinstance(self.lengths, torch.Tensor):
            return self.lengths.numel()
        return self.shape[0] if self.shape else 1  # a lone id has no shape

    def bag_lengths(self) -> torch.Tensor:
        """int64 `[bags]`."""
        if isinstance(self.lengths, torch.Tensor):
            return self.lengths
        return torch.full((self.bags,), self.lengths, dtype=torch.int64, device=self.ids.device)

    def lengths_without(self, padding: int) -> torch.Tensor:
        """How long the bags are without the id `padding`, int64 `[bags]`."""
        bags = torch.repeat_interleave(self.bag_lengths(), output_size=self.ids.numel())
        return torch.zeros_like(self.bag_lengths()).index_add_(0, bags, (self.ids != padding).to(torch.int64))

    def without(self, padding: int) -> FeatureIds:
        """The same bags without the id `padding`."""
        kept, lengths = self.ids != padding, self.lengths_without(padding)
        weights = None if self.weights is None else self.weights[kept]
        return self._replace(ids=self.ids[kept], lengths=lengths, weights=weights)  # host sync on a GPU: how many are kept


def read_feature(value: Any, feature: Feature, device: torch.device) -> FeatureIds:
    """One feature's part of a batch, out of any accepted form.

    Raises:
        DtypeError: ids are not int32 or int64, weights are not floating point, or a value is no tensor.
        OffsetsError: offsets do not describe the ids.
        InputError: a shape that the feature's pooling cannot take.
    """
    if type(value) is torch.Tensor and not value.is_nested:  # the usual case, which 800 features meet 800 times a step
        return _dense(value, None, feature, device)
    if isinstance(value, Jagged):
        ids = _checked_ids(value.ids, feature, device)
        weights = None if value.weights is None else _checked_weights(value.weights, ids, feature, device)
        return _bags(ids, _moved(value.lengths, device).to(torch.int64), weights, feature)
    if isinstance(value, tuple | list):
        if not 2 <= len(value) <= 3:
            raise InputError(
                f"feature {feature.name!r}: a tuple or list must be (ids, offsets) or (ids, offsets, weights); "
                "ids alone go as a tensor"
            )
        return _ragged(value[0], value[1], value[2] if len(value) == 3 else None, feature, device)
    if not isinstance(value, torch.Tensor):
        raise DtypeError(f"feature {feature.name!r}: expected a tensor or (ids, offsets[, weights]), not {_no_tensor(value)}")
    if value.is_nested:
        if value.layout != torch.jagged or value.dim() != 2:
            raise InputError(f"feature {feature.name!r}: a nested tensor must have layout torch.jagged and two dimensions")
        if value.lengths() is not None:  # type: ignore[operator]
            raise InputError(f"feature {feature.name!r}: a nested tensor with holes is not accepted; make it contiguous")
        return _ragged(value.values(), jagged_offsets(value), None, feature, device)
    return _dense(value, None, feature, device)


def read_bags(
    ids: Any,
    offsets: Any,
    weights: Any,
    include_last_offset: bool,
    feature: Feature,
    device: torch.device,
    last_takes_rest: bool = True,
) -> FeatureIds:
    """Read `nn.EmbeddingBag`'s arguments: ids `[B, L]`, or ids `[n]` with offsets `[B]` (`[B + 1]` with `include_last_offset`).
    Nested ids take nested weights.

    Args:
        last_takes_rest: ids behind the last offset belong to the last bag; else they are refused.

    Raises:
        InputError, DtypeError, OffsetsError: as `read_feature`.
    """
    if isinstance(ids, torch.Tensor) and ids.is_nested:
        return _read_nested_bags(ids, offsets, weights, feature, device)
    if isinstance(ids, torch.Tensor):
        if ids.dim() == 2 and offsets is not None:
            raise InputError(f"feature {feature.name!r}: two-dimensional ids are bags already; offsets must be None")
        if ids.dim() == 1 and offsets is None:
            raise InputError(f"feature {feature.name!r}: one-dimensional ids need offsets")
        if isinstance(offsets, torch.Tensor) and offsets.dim() == 1 and ids.dim() == 1:
            offsets = _ended(offsets, ids.numel(), include_last_offset, last_takes_rest, feature)
    if offsets is None and weights is None:
        return read_feature(ids, feature, device)
    return _ragged(ids, offsets, weights, feature, device, of_bags=True)


def _read_nested_bags(ids: torch.Tensor, offsets: Any, weights: Any, feature: Feature, device: torch.device) -> FeatureIds:
    if offsets is not None:
        raise InputError(f"feature {feature.name!r}: nested ids are bags already; offsets must be None")
    if weights is None:
        return read_feature(ids, feature, device)
    if not isinstance(weights, torch.Tensor) or not weights.is_nested:
        raise InputError(f"feature {feature.name!r}: nested ids need nested weights")
    read_feature(ids, feature, device)  # for its checks
    if not torch.equal(jagged_offsets(weights).to(device), jagged_offsets(ids).to(device)):
        raise InputError(f"feature {feature.name!r}: nested weights must have the lengths of the nested ids; give one an id")
    return _ragged(ids.values(), jagged_offsets(ids), weights.values(), feature, device)


def jagged_offsets(nested: Any) -> torch.Tensor:
    """The offsets of a nested jagged tensor, which torch's own annotations do not know."""
    return nested.offsets()


def _dense(ids: torch.Tensor, weights: torch.Tensor | None, feature: Feature, device: torch.device) -> FeatureIds:
    """A tensor without offsets: bags along the last of two dimensions; one dimension is a bag an id."""
    ids = _checked_ids(ids, feature, device)
    if weights is not None:
        if weights.shape != ids.shape:
            raise InputError(
                f"feature {feature.name!r}: weights {tuple(weights.shape)} must have the ids' shape {tuple(ids.shape)}"
            )
        weights = _checked_weights(weights.reshape(-1), ids.reshape(-1), feature, device)
    shape = tuple(ids.shape)
    if feature.pooling is None:
        return FeatureIds(ids.reshape(-1), 1, shape, weights)
    if len(shape) not in (1, 2):
        raise InputError(
            f"feature {feature.name!r} is pooled ({feature.pooling}): ids must be [B] or [B, ids a bag], not "
            f"{list(shape)}; pass (ids, offsets) for bags of different lengths"
        )
    if len(shape) == 1:
        return FeatureIds(ids, 1, shape, weights)
    return FeatureIds(ids.reshape(-1), shape[1], shape[:1], weights)


def _ended(offsets: torch.Tensor, count: int, has_end: bool, last_takes_rest: bool, feature: Feature) -> torch.Tensor:
    """`nn.EmbeddingBag`'s offsets with the end of the last bag, which is the number of ids but where the user said something wrong.

    Raises:
        OffsetsError: ids are in no bag.
    """
    where = f"feature {feature.name!r}"
    if offsets.numel() <= has_end and count:
        raise OffsetsError(f"{where}: offsets {offsets.tolist()} make no bag, but there are {count} id(s)")
    if not has_end:
        return torch.cat([offsets, torch.tensor([count], device=offsets.device)])
    last = int(offsets[-1]) if offsets.numel() else count  # host sync on a GPU
    if last >= count or bool(offsets[-1] < offsets[-2]):
        return offsets
    if not last_takes_rest:
        raise OffsetsError(
            f"{where}: {count - last} id(s) stand behind the last offset {last}. torch on the CPU leaves them out of the sum, but "
            "not of the mean's length, and reads their gradients from memory that nobody wrote; on a GPU the last bag has them. "
            "Cut ids (and weights) at the last offset, or end the offsets with the number of ids"
        )
    return torch.cat([offsets[:-1], torch.tensor([count], device=offsets.device)])


def _ragged(
    ids: Any,
    offsets: torch.Tensor | None,
    weights: torch.Tensor | None,
    feature: Feature,
    device: torch.device,
    of_bags: bool = False,
) -> FeatureIds:
    if offsets is None:
        return _dense(ids, weights, feature, device)
    ids = _checked_ids(ids, feature, device)
    if ids.dim() != 1:
        raise InputError(f"feature {feature.name!r}: ids beside offsets must have one dimension, not {list(ids.shape)}")
    weights = None if weights is None else _checked_weights(weights, ids, feature, device)
    return _bags(ids, _lengths(offsets, ids.numel(), feature, device, of_bags), weights, feature)


def _bags(ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None, feature: Feature) -> FeatureIds:
    shape = (ids.numel(),) if feature.pooling is None else (lengths.numel(),)
    return FeatureIds(ids, lengths, shape, weights)


def _lengths(offsets: Any, count: int, feature: Feature, device: torch.device, of_bags: bool) -> torch.Tensor:
    """Of each bag. of_bags: the offsets are `nn.EmbeddingBag`'s, with their end."""
    if not isinstance(offsets, torch.Tensor) or offsets.dtype not in INTEGERS or offsets.dim() != 1:
        raise DtypeError(f"feature {feature.name!r}: offsets must be a one-dimensional tensor of integers (int32 or int64, say)")
    if offsets.numel() == 0:
        raise OffsetsError(f"feature {feature.name!r}: offsets are empty; they start with 0 and end with the number of ids")
    offsets = _moved(offsets, device).to(torch.int64)
    falls = offsets[1:] < offsets[:-1]  # and not a length below 0: one of huge offsets may wrap around
    first, last = int(offsets[0]), int(offsets[-1])  # host sync on a GPU
    if of_bags and first != 0:
        raise OffsetsError(f"feature {feature.name!r}: offsets begin at {first}, but the first bag must begin at 0")
    if not of_bags and (first != 0 or last != count):
        raise OffsetsError(
            f"feature {feature.name!r}: offsets run from {first} to {last}, but must run from 0 to {count}, the number of ids. "
            "There is one offset more than there are bags; nn.EmbeddingBag's offsets need the number of ids appended"
        )
    if bool(falls.any()):
        at = int(falls.nonzero()[0])
        raise OffsetsError(
            f"feature {feature.name!r}: offsets fall from {int(offsets[at])} to {int(offsets[at + 1])} at position {at + 1}; "
            "they must not fall"
        )
    if of_bags and last != count:
        raise OffsetsError(
            f"feature {feature.name!r}: offsets end at {last}, but there are {count} id(s); with include_last_offset=True the last "
            "offset is the end of the last bag"
        )
    return offsets.diff()


def _no_tensor(value: Any) -> str:
    """What was given in place of a tensor, and what makes one of it."""
    if isinstance(value, str):
        return "str; the ids of texts are torch.from_numpy(se.hash64(texts))"
    return type(value).__name__ + ("; use torch.from_numpy(...)" if type(value).__module__ == "numpy" else "")


def _checked_ids(ids: Any, feature: Feature, device: torch.device) -> torch.Tensor:
    if not isinstance(ids, torch.Tensor):
        raise DtypeError(f"feature {feature.name!r}: ids must be a tensor, not {_no_tensor(ids)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"feature {feature.name!r}: ids must be int32 or int64, not {ids.dtype}; use ids.long()")
    return _moved(ids, device)


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device; to a GPU in the order of its stream, without waiting for what else it does."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _checked_weights(weights: Any, ids: torch.Tensor, feature: Feature, device: torch.device) -> torch.Tensor:
    if not isinstance(weights, torch.Tensor) or not weights.is_floating_point():
        raise DtypeError(f"feature {feature.name!r}: weights must be a floating-point tensor")
    if weights.shape != ids.shape:
        raise InputError(f"feature {feature.name!r}: {weights.numel()} weights for {ids.numel()} ids; give one weight an id")
    if not POOLINGS[feature.pooling].takes_weights:
        raise InputError(f"feature {feature.name!r}: weights need pooling {WEIGHTED}; this table has {feature.pooling!r}")
    return weights.to(device)
