"""Vectors in the output types that go with an input's: nested tensors, and TorchRec's, with what a batch must have for these.
TorchRec is there when a KeyedJaggedTensor is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import register_pytree_node

from shardembed.errors import FeatureError, InputError
from shardembed.inputs.features import jagged_offsets
from shardembed.inputs.jagged import Jagged
from shardembed.journey.route.side_by_side import Outputs
from shardembed.tables.table_config import Feature


class Vectors(dict[str, torch.Tensor]):
    """The vectors of each feature, by its name.

    Features that pool answer with parts of one tensor, side by side in their order; `concatenated` is that tensor.
    """

    def __init__(self, vectors: Any = (), whole: torch.Tensor | None = None) -> None:
        super().__init__(vectors)
        self._whole = whole
        self._laid_out = list(self.values())

    def concatenated(self) -> torch.Tensor:
        """All vectors side by side, `[B, sum of embedding_dim]`, in the order of the features: `torch.cat(list(out.values()), 1)`,
        without a copy where all features pool, their tables have one dtype, and nothing has been replaced or written into.

        It shares memory with the single vectors: of both, one may be used where either is written into in place. Else the backward
        raises StepError.

        Raises:
            RuntimeError: torch's own, where they do not fit side by side.
        """
        now = list(self.values())
        same = len(now) == len(self._laid_out) and all(ours is theirs for ours, theirs in zip(now, self._laid_out, strict=True))
        if self._whole is None or not same or any(not part.is_inference() and part._version for part in now):
            return torch.cat(now, 1)
        return self._whole


# A dict to whoever takes outputs apart and puts them together again (torch.func, torch.export, activation checkpointing).
register_pytree_node(
    Vectors,
    lambda vectors: (list(vectors.values()), list(vectors)),
    lambda values, names: Vectors(zip(names, values, strict=True)),
)


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


def keyed_tensor(
    names: Sequence[str], features: Sequence[Feature], outputs: Outputs, batch: Any, dtype: torch.dtype | None = None
) -> Any:
    """A `KeyedTensor` of pooled vectors, with as many rows as the inverse indices have where there are some. dtype: of it, if it is
    not to be that of the tables.
    """
    from torchrec import KeyedTensor

    each, whole, inverse = outputs.each, outputs.whole, batch.inverse_indices_or_none()
    widths = [output.shape[1] for output in each]
    if inverse is not None:
        rows = dict(zip(inverse[0], inverse[1].to(each[0].device), strict=True))
        whole = torch.cat([output.index_select(0, rows[feature.key]) for output, feature in zip(each, features, strict=True)], 1)
    elif whole is None:
        whole = torch.cat(each, 1)
    return KeyedTensor(list(names), widths, whole if dtype is None else whole.to(dtype))


def jagged_tensor(vectors: torch.Tensor, part: Jagged, with_ids: bool = False) -> Any:
    """A `JaggedTensor` of one vector an id; the ids are its weights where they are wanted."""
    from torchrec import JaggedTensor

    ids = part.ids.to(vectors.device) if with_ids else None
    return JaggedTensor(vectors, lengths=part.lengths.to(vectors.device), weights=ids)
