"""TorchRec's `EmbeddingBagCollection` and `EmbeddingCollection` as sites: one module, many weights.

A table is named by the path of its module and its own name, `sparse.ebc.t1`, and a feature by the path and what TorchRec calls
its output, `sparse.ebc.f1` or `sparse.ebc.f1@t1`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from shardembed.convert.plain import check_hooks, check_plain
from shardembed.convert.sites import Plain, Site, Use, pooling_of
from shardembed.errors import UnsupportedError
from shardembed.journey.journey import Journey
from shardembed.modules.base import ShardedModule
from shardembed.modules.keyed import ShardedEmbeddingBagCollection, ShardedEmbeddingCollection
from shardembed.modules.lookup import Lookup
from shardembed.tables.pooling import Pooling
from shardembed.tables.table_config import Feature, Init, TableConfig


def _torchrec() -> Any:
    """TorchRec's embedding modules; None where nobody has imported them, so that no module can be one of them."""
    return sys.modules.get("torchrec.modules.embedding_modules")


class KeyedSite(Site):
    """TorchRec's unsharded modules."""

    @classmethod
    def of(cls, module: nn.Module, path: str) -> Self | None:
        torchrec = _torchrec()
        if torchrec is None or not isinstance(module, torchrec.EmbeddingBagCollection | torchrec.EmbeddingCollection):
            return None
        return cls(module, [path])

    def check(self) -> None:
        torchrec = _torchrec()
        kind = torchrec.EmbeddingBagCollection if self._pooled else torchrec.EmbeddingCollection
        if type(self.module).forward is not kind.forward:
            raise UnsupportedError(
                f"{self.path}: {type(self.module).__name__} has a forward of its own, which its sharded twin would not have; keep "
                f"it as it is with skip=[{self.path!r}], or make it hold a {kind.__name__} instead of being one"
            )
        check_hooks(self.path, self.module, skip=self.path)
        for use in self.uses():
            check_plain(use.keys[0].removesuffix(".weight"), use.module, skip=self.path)

    @property
    def _pooled(self) -> bool:
        return isinstance(self.module, _torchrec().EmbeddingBagCollection)

    @property
    def _configs(self) -> list[Any]:
        return self.module.embedding_bag_configs() if self._pooled else self.module.embedding_configs()

    @property
    def _child(self) -> str:
        """Where TorchRec keeps its plain modules."""
        return "embedding_bags" if self._pooled else "embeddings"

    def _outputs(self) -> list[list[str]]:
        """What TorchRec calls the outputs, by table."""
        return _torchrec().get_embedding_names_by_table(self._configs)

    def uses(self) -> list[Use]:
        found: list[Use] = []
        for config, outputs in zip(self._configs, self._outputs(), strict=True):
            name = f"{self.path}.{config.name}"
            module: Plain = getattr(self.module, self._child)[config.name]
            pooling = pooling_of(module)
            keys = [f"{path}.{self._child}.{config.name}.weight" for path in self.paths]
            features: dict[str, Pooling] = {f"{self.path}.{output}": pooling for output in outputs}
            found.append(Use(self.path, name, module, features, keys, partial(_start, config, name)))
        return found

    def sharded(self, journey: Journey, features: Mapping[str, Feature]) -> Lookup:
        own: list[Feature] = []
        keys: dict[str, str] = {}
        outputs = self._outputs()
        for config, names in zip(self._configs, outputs, strict=True):
            mine = [features[f"{self.path}.{name}"] for name in names]
            own += [replace(feature, key=key) for feature, key in zip(mine, config.feature_names, strict=True)]
            keys[f"{self._child}.{config.name}.weight"] = journey.tables[mine[0].table].name
        flat = [name for names in outputs for name in names]
        if self._pooled:
            weighted = self.module.is_weighted()
            return ShardedEmbeddingBagCollection(journey, self.path, own, flat, keys, self._configs, weighted)
        return ShardedEmbeddingCollection(journey, self.path, own, flat, keys, self._configs, self.module.need_indices())

    @staticmethod
    def restored(module: ShardedModule, weights: Mapping[str, nn.Parameter]) -> nn.Module | None:
        meta, torchrec = torch.device("meta"), _torchrec()
        if isinstance(module, ShardedEmbeddingBagCollection):
            plain = torchrec.EmbeddingBagCollection(module.configs, module.is_weighted(), meta)
        elif isinstance(module, ShardedEmbeddingCollection):
            plain = torchrec.EmbeddingCollection(module.configs, meta, module.need_indices())
        else:
            return None
        for key, table in module.weight_keys.items():
            plain.get_submodule(key.removesuffix(".weight")).weight = weights[table]
            plain._device = weights[table].device  # TorchRec's `device`; built there, the tables would be filled first
        return plain


REMAPPING = (
    ("torchrec.modules.mc_embedding_modules", "BaseManagedCollisionEmbeddingCollection"),
    ("torchrec.modules.itep_embedding_modules", "ITEPEmbeddingBagCollection"),
    ("torchrec.modules.itep_embedding_modules", "ITEPEmbeddingCollection"),
)


class RemappedSite(KeyedSite):
    """A collection behind a module that numbers ids anew as it sees them: each rank would number its own, for tables they share."""

    @classmethod
    def of(cls, module: nn.Module, path: str) -> Self | None:
        kinds = tuple(getattr(sys.modules[where], name) for where, name in REMAPPING if where in sys.modules)
        return cls(module, [path]) if isinstance(module, kinds) else None

    def uses(self) -> list[Use]:
        return []

    def check(self) -> None:
        raise UnsupportedError(
            f"{self.path}: {type(self.module).__name__} gives ids new numbers, which would differ between ranks while they share "
            f"the table; put a collection without it in its place and shard with dynamic=, whose tables take the ids themselves, "
            f"or keep it as it is with skip=[{self.path!r}]"
        )


def _start(config: Any, name: str) -> Init:
    return TableConfig.of(replace(config, name=name)).start
