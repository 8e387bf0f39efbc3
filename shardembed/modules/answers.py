"""Vectors in the output types that go with an input's: nested tensors, and TorchRec's, with what a batch must have for these.
TorchRec is there when a KeyedJaggedTensor is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardembed.errors import FeatureError, InputError
from shardembed.inputs.features import jagged_offsets
from shardembed.inputs.jagged import Jagged
from shardembed.tables.table_config import Feature


def nested_like(ids: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """One vector an id, `[n, D]`, as a nested tensor with the lengths of the nested `ids`."""
    nested = torch.nested.nested_tensor_from_jagged(vectors, jagged_offsets(ids))
    # Else a view from no_grad, which may not be written once gradients are on again, as nn.Embedding's answer may.
    return nested if torch.is_grad_enabled() else nested.detach()


def check_bags(where: str, batch: Any, keys: Sequence[str], parts: Mapping[str, Jagged]) -> None:
    """Whether the pooled vectors of these keys fit side by side.

    Raises:
        InputError, FeatureError: the batch sizes differ, and no inverse indices bring them together.
    """
    sizes = {key: parts[key].lengths.numel() for key in keys if key in parts}
    inverse = batch.inverse_indices_or_none()
    if inverse is None:
        if len(set(sizes.values())) > 1:
            raise InputError(
                f"{where}: batch sizes differ by key, {sizes}; a KeyedTensor needs inverse_indices to bring them together"
            )
        return
    rows = dict(zip(inverse[0], inverse[1], strict=True))
    for key, size in sizes.items():
        if key not in rows:
            raise FeatureError(f"{where}: the inverse_indices lack the key {key!r}; they have {list(rows)}")
        if rows[key].numel() and not 0 <= int(rows[key].min()) <= int(rows[key].max()) < size:  # host sync on a GPU
            raise InputError(f"{where}: inverse_indices of {key!r} point outside its {size} bag(s)")


def keyed_tensor(names: Sequence[str], features: Sequence[Feature], outputs: Sequence[torch.Tensor], batch: Any) -> Any:
    """A `KeyedTensor` of pooled vectors, with as many rows as the inverse indices have where there are some."""
    from torchrec import KeyedTensor

    inverse = batch.inverse_indices_or_none()
    if inverse is not None:
        rows = dict(zip(inverse[0], inverse[1].to(outputs[0].device), strict=True))
        outputs = [output.index_select(0, rows[feature.key]) for output, feature in zip(outputs, features, strict=True)]
    return KeyedTensor(list(names), [output.shape[1] for output in outputs], torch.cat(list(outputs), 1))


def jagged_tensor(vectors: torch.Tensor, part: Jagged, with_ids: bool = False) -> Any:
    """A `JaggedTensor` of one vector an id; the ids are its weights where they are wanted."""
    from torchrec import JaggedTensor

    ids = part.ids.to(vectors.device) if with_ids else None
    return JaggedTensor(vectors, lengths=part.lengths.to(vectors.device), weights=ids)
