"""`Collate`: what a DataLoader makes batches with when samples hold lists of ids of any length.

It works in worker processes and needs no job: it knows the features of a collection, and nothing of its tables.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from shardembed.config.hints import nearest
from shardembed.errors import ConfigError, DtypeError, FeatureError, InputError
from shardembed.inputs.features import FeatureIds
from shardembed.inputs.ids import IdBatch
from shardembed.tables.pooling import POOLINGS, WEIGHTED, Pooling
from shardembed.tables.table_config import Feature

INT64 = np.iinfo(np.int64)


@dataclass(frozen=True)
class Collated:
    """A batch of samples.

    Attributes:
        ids: of all features, for the collection's call.
        values: what else the samples hold, put together by torch's `default_collate`; `batch["label"]` is `batch.values["label"]`.
        size: samples.
    """

    ids: IdBatch
    values: dict[str, Any]
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise FeatureError(f"the batch has no value {name!r}{_known(name, self.values)}; ids are in .ids")
        return self.values[name]

    def lengths(self, feature: str) -> torch.Tensor:
        """Ids of each sample, int64 `[size]`: for cutting the vectors of a feature that is not pooled, `[ids, D]`."""
        for one, part in zip(self.ids.features, self.ids.parts, strict=True):
            if feature in (one.name, one.key):
                return part.bag_lengths()
        raise FeatureError(f"there is no feature {feature!r}{_known(feature, [one.name for one in self.ids.features])}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Collated:
        """The same batch on another device."""
        moved = _tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking), self.values)
        return replace(self, ids=self.ids.to(device, non_blocking), values=moved)

    def pin_memory(self) -> Collated:
        """The same batch in pinned host memory; a DataLoader with `pin_memory=True` asks for it."""
        return replace(self, ids=self.ids.pin_memory(), values=_tensors(lambda tensor: tensor.pin_memory(), self.values))


class Collate:
    """A `collate_fn`: a list of samples becomes a `Collated` batch, in a worker process or not.

    A sample is a dict. Under the name of a feature it holds an id or the ids of a bag: an int, a list or tuple of ints, or an array
    or tensor of integers with at most one dimension. Everything else in it goes through torch's `default_collate`.

    Args:
        features: of the collection that will look the ids up: `emb.features`.
        weights: for features with weighted sums, the name under which a sample holds a number for each id.

    Raises:
        ConfigError: on construction; weights of a feature that there is not, or whose pooling takes none.
        InputError, FeatureError, DtypeError: when called; names feature and sample (from 0, in its batch).
    """

    def __init__(self, features: Sequence[Feature], weights: Mapping[str, str] | None = None) -> None:
        if not features or not all(isinstance(feature, Feature) for feature in features):
            raise ConfigError("Collate takes the features of a collection: se.Collate(emb.features)")
        self._features, self._weights = tuple(features), dict(weights or {})
        self._keys = list(dict.fromkeys(feature.key for feature in self._features))
        for key in self._weights:
            poolings: set[Pooling] = {feature.pooling for feature in self._features if feature.key == key}
            wrong = [pooling for pooling in poolings if not POOLINGS[pooling].takes_weights]
            if wrong or not poolings:
                what = f"is pooled by {wrong[0]!r}" if wrong else f"is not there{_known(key, self._keys)}"
                raise ConfigError(f"weights: feature {key!r} {what}; weights need a feature with pooling {WEIGHTED}")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Collated:
        samples = list(samples)
        for number, sample in enumerate(samples):
            if not isinstance(sample, Mapping):
                raise DtypeError(f"sample {number} of the batch is {type(sample).__name__}; samples must be dicts by feature")
        read = {key: _read_ids(_column(samples, key, "feature"), key) for key in self._keys}
        weights = {key: self._read_weights(samples, key, read[key][1]) for key in self._weights}
        # One tensor that all parts are cut from: it travels to the main process once.
        flat = torch.from_numpy(np.concatenate([read[feature.key][0] for feature in self._features]))
        pieces = flat.split([len(read[feature.key][0]) for feature in self._features])
        parts = tuple(
            self._part(feature, ids, torch.from_numpy(read[feature.key][1]), weights.get(feature.key))
            for feature, ids in zip(self._features, pieces, strict=True)
        )
        return Collated(IdBatch(flat, parts, self._features), self._values(samples), len(samples))

    @staticmethod
    def _part(feature: Feature, ids: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor | None) -> FeatureIds:
        return FeatureIds(ids, lengths, (len(ids) if feature.pooling is None else len(lengths),), weights)

    def _read_weights(self, samples: list[Mapping[str, Any]], key: str, lengths: np.ndarray) -> torch.Tensor:
        name = self._weights[key]
        found = []
        for number, value in enumerate(_column(samples, name, f"weights of feature {key!r}:")):
            given = _array(value)
            if given is None or given.dtype.kind not in "iuf" or given.ndim > 1:
                raise DtypeError(
                    f"weights of feature {key!r}: sample {number} has {_brief(value)} as {name!r}; give a number for each id"
                )
            if given.size != lengths[number]:
                raise InputError(
                    f"weights of feature {key!r}: sample {number} has {given.size} weight(s) for {lengths[number]} id(s); give "
                    "each id one"
                )
            found.append(given.reshape(-1).astype(np.float32))
        return torch.from_numpy(np.concatenate(found) if found else np.empty(0, np.float32))

    def _values(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        taken = {*self._keys, *self._weights.values()}
        names = [name for name in (samples[0] if samples else ()) if name not in taken]
        for number, sample in enumerate(samples):
            for name in sample:
                if name not in taken and name not in names:
                    raise FeatureError(
                        f"sample {number} of the batch has {name!r}, which sample 0 has not{_known(name, self._keys)}"
                    )
        values = {}
        for name in names:
            column = _column(samples, name, "value")
            try:
                values[name] = default_collate(column)
            except (TypeError, RuntimeError, KeyError) as error:
                raise InputError(
                    f"value {name!r}: torch's default_collate cannot put the samples together ({error}). Give all of them one type "
                    "and shape; lists of different lengths are for features, which are " + ", ".join(map(repr, self._keys))
                ) from error
        return values


def _column(samples: list[Mapping[str, Any]], name: str, what: str) -> list[Any]:
    try:
        return [sample[name] for sample in samples]
    except KeyError:
        number = next(number for number, sample in enumerate(samples) if name not in sample)
        near = nearest(name, [str(key) for key in samples[number]])
        raise FeatureError(
            f"{what} {name!r}: sample {number} of the batch lacks it{near}. All samples of a batch have the same names; where "
            "there are no ids, give an empty list"
        ) from None


def _read_ids(column: list[Any], key: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all samples, and how many each has; both int64."""
    if column and all(type(value) is int for value in column):  # the usual case
        column = [np.array(column, object if any(not INT64.min <= value <= INT64.max for value in column) else np.int64)]
        if column[0].dtype == np.int64:
            return column[0], np.ones(len(column[0]), np.int64)
        column = list(column[0])
    found = [_ids(value, key, number) for number, value in enumerate(column)]
    lengths = np.array([len(ids) for ids in found], np.int64)
    return np.concatenate(found) if found else np.empty(0, np.int64), lengths


def _ids(value: Any, key: str, number: int) -> np.ndarray:
    given = _array(value)
    if given is None or (given.dtype.kind not in "iu" and given.size):
        hint = ""
        if isinstance(value, str) or (given is not None and given.dtype.kind in "US"):
            hint = "; se.Hashing and se.Vocabulary make ids of texts"
        raise DtypeError(f"feature {key!r}: sample {number} has {_brief(value)}; ids are integers, or a list of them{hint}")
    if given.ndim > 1:
        raise InputError(
            f"feature {key!r}: sample {number} has ids of shape {list(given.shape)}; a sample has one id or one list of ids"
        )
    if given.dtype.kind == "u" and given.size and int(given.max()) > INT64.max:
        raise DtypeError(f"feature {key!r}: sample {number} has the id {int(given.max())}, which does not fit int64; hash it first")
    return given.reshape(-1).astype(np.int64, copy=False)


def _array(value: Any) -> np.ndarray | None:
    """The value as an array; None for what is no number and no list or array of numbers."""
    if isinstance(value, torch.Tensor):
        return None if value.is_nested or value.dtype == torch.bfloat16 else value.detach().cpu().numpy()
    if not isinstance(value, numbers.Number | str | bytes | list | tuple | np.ndarray):
        return None
    try:
        # numpy makes integers of booleans beside integers.
        found = np.asarray(value)
    except (ValueError, OverflowError):
        return None
    return None if found.dtype.kind == "i" and isinstance(value, list | tuple) and bool in map(type, value) else found


def _tensors(change: Callable[[torch.Tensor], torch.Tensor], values: Any) -> Any:
    return pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, torch.Tensor) else leaf, values)


def _known(name: str, names: Any) -> str:
    listed = [str(one) for one in names]
    near = nearest(name, listed)
    return f"{near}{'' if near else '.'} There are {', '.join(map(repr, listed)) or 'none'}"


def _brief(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:40] + '...'}"
