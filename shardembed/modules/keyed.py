"""TorchRec's `EmbeddingBagCollection` and `EmbeddingCollection`, cut over the ranks: the same call, the same answer.

Only `se.shard` makes them, in place of a model's own, so TorchRec is there when they run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardembed.errors import DtypeError, FeatureError, InputError
from shardembed.inputs.features import FeatureIds
from shardembed.inputs.ids import read_features
from shardembed.inputs.jagged import Jagged, is_keyed_jagged, split_keyed_jagged
from shardembed.journey.journey import Journey
from shardembed.modules.answers import check_bags, jagged_tensor, keyed_tensor
from shardembed.modules.base import eager
from shardembed.modules.lookup import Lookup
from shardembed.tables.table_config import Feature


class _Keyed(Lookup):
    """Looks up the keys of a KeyedJaggedTensor; `outputs` is what TorchRec calls each answer."""

    def __init__(
        self,
        journey: Journey,
        name: str,
        features: Sequence[Feature],
        outputs: Sequence[str],
        keys: Mapping[str, str],
        configs: list[Any],
    ) -> None:
        super().__init__(journey, name, features, keys)
        self.outputs, self.configs = list(outputs), configs

    @property
    def device(self) -> torch.device:
        """Where the shards lie, and where outputs are."""
        return self.journey.device

    def read(self, *arguments: Any) -> tuple[FeatureIds, ...]:
        (batch,) = arguments
        if not is_keyed_jagged(batch):
            raise DtypeError(f"{self.name} takes a KeyedJaggedTensor, not {type(batch).__name__}")
        parts = split_keyed_jagged(batch)
        wanted = dict.fromkeys(feature.key for feature in self.features)
        missing = [key for key in wanted if key not in parts]
        if missing:
            raise FeatureError(f"{self.name}: the KeyedJaggedTensor lacks the key(s) {missing}; it has {list(parts)}")
        chosen = {key: self._weighed(key, parts[key]) for key in wanted}
        self._check(batch, chosen)
        return read_features(chosen, self.features, self.journey.device)

    def _weighed(self, key: str, part: Jagged) -> Jagged:
        """Without the weights that this module does not look at."""
        return Jagged(part.ids, part.lengths, None)

    def _check(self, batch: Any, parts: Mapping[str, Jagged]) -> None:
        """Refuse what the outputs could not be made of."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("embedding_bags", "embeddings"):
                raise AttributeError(
                    f"the tables of {self.name} lie cut over the ranks, so it has no {name}; read rows with rows(table, ids), "
                    f"write them with load_rows(table, source), or get TorchRec's module back from se.unshard(). Its tables are "
                    f"{[table.name for table in self.tables]}"
                ) from None
            raise


class ShardedEmbeddingBagCollection(_Keyed):
    """`torchrec.EmbeddingBagCollection`, cut over the ranks: a KeyedJaggedTensor in, a KeyedTensor out, always float32.

    The batch may have more keys than are looked up, in any order, and batch sizes may differ by key where it has inverse indices.
    """

    def __init__(
        self,
        journey: Journey,
        name: str,
        features: Sequence[Feature],
        outputs: Sequence[str],
        keys: Mapping[str, str],
        configs: list[Any],
        is_weighted: bool,
    ) -> None:
        super().__init__(journey, name, features, outputs, keys, configs)
        self._is_weighted = is_weighted

    @eager
    def forward(self, features: Any) -> Any:
        """A `KeyedTensor`, `[B, sum of embedding_dim]`. Collective; the batch of a rank may be empty."""
        return keyed_tensor(self.outputs, self.features, self.look_up(features), features, torch.float32)  # as TorchRec, always

    def _weighed(self, key: str, part: Jagged) -> Jagged:
        if self._is_weighted and part.weights is None:
            raise InputError(f"{self.name} is weighted, but the KeyedJaggedTensor has no weights")
        return part if self._is_weighted else super()._weighed(key, part)

    def _check(self, batch: Any, parts: Mapping[str, Jagged]) -> None:
        check_bags(self.name, batch, list(parts), parts)

    def embedding_bag_configs(self) -> list[Any]:
        """TorchRec's `EmbeddingBagConfig`s."""
        return self.configs

    def is_weighted(self) -> bool:
        """Whether ids have weights."""
        return self._is_weighted


class ShardedEmbeddingCollection(_Keyed):
    """`torchrec.EmbeddingCollection`, cut over the ranks: a KeyedJaggedTensor in, a dict of JaggedTensors out, always float32."""

    def __init__(
        self,
        journey: Journey,
        name: str,
        features: Sequence[Feature],
        outputs: Sequence[str],
        keys: Mapping[str, str],
        configs: list[Any],
        need_indices: bool,
    ) -> None:
        super().__init__(journey, name, features, outputs, keys, configs)
        self._need_indices = need_indices

    @eager
    def forward(self, features: Any) -> dict[str, Any]:
        """A `JaggedTensor` a feature, `[ids, embedding_dim]`, with the ids as its weights where they are needed. Collective; the
        batch of a rank may be empty.
        """
        vectors = self.look_up(features).each
        parts = split_keyed_jagged(features)
        return {
            name: jagged_tensor(output.float(), parts[feature.key], self._need_indices)
            for name, feature, output in zip(self.outputs, self.features, vectors, strict=True)
        }

    def embedding_configs(self) -> list[Any]:
        """TorchRec's `EmbeddingConfig`s."""
        return self.configs

    def need_indices(self) -> bool:
        """Whether outputs carry their ids as weights."""
        return self._need_indices

    def embedding_dim(self) -> int:
        """The columns of every table."""
        return self.tables[0].embedding_dim

    def embedding_names_by_table(self) -> list[list[str]]:
        """What the outputs of each table are called."""
        names = iter(self.outputs)
        return [[next(names) for _ in config.feature_names] for config in self.configs]
