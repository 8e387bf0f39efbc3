"""`nn.Embedding` and `nn.EmbeddingBag` as sites: one weight, one feature, both named by the module's path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from typing_extensions import Self

from shardembed.convert.sites import Plain, Site, Use, pooling_of
from shardembed.errors import ConfigError, UnsupportedError
from shardembed.journey.journey import Journey
from shardembed.modules.base import ShardedModule
from shardembed.modules.id_embedding import IdEmbedding
from shardembed.modules.lookup import Lookup
from shardembed.modules.single import Embedding, EmbeddingBag
from shardembed.tables.table_config import Feature, Normal

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def check_plain(path: str, module: Plain, skip: str) -> None:
    """What a subclass, a parametrization or a hook adds would be lost.

    Raises:
        ConfigError: naming what to skip instead.
    """
    torch_own = nn.Embedding if isinstance(module, nn.Embedding) else nn.EmbeddingBag
    if type(module).forward is not torch_own.forward or "weight" not in module._parameters:
        raise ConfigError(
            f"{path} is a {type(module).__name__}, which does more than {torch_own.__name__}; replace it by a plain one, or keep "
            f"it as it is with skip=[{skip!r}]"
        )
    check_hooks(path, module, skip)


def check_hooks(path: str, module: nn.Module, skip: str) -> None:
    if any(getattr(module, hooks) for hooks in HOOKS):
        raise ConfigError(
            f"{path} has hooks, which would be lost with the module; register them after shard(), or keep it with skip=[{skip!r}]"
        )


class PlainSite(Site):
    """torch's own modules."""

    @classmethod
    def of(cls, module: nn.Module, path: str) -> Self | None:
        return cls(module, [path]) if isinstance(module, nn.Embedding | nn.EmbeddingBag) else None

    def check(self) -> None:
        check_plain(self.path, self.module, skip=self.path)

    def uses(self) -> list[Use]:
        keys = [f"{path}.weight" for path in self.paths]
        return [Use(self.path, self.path, self.module, {self.path: pooling_of(self.module)}, keys, Normal)]

    def sharded(self, journey: Journey, features: Mapping[str, Feature]) -> Lookup:
        feature = features[self.path]
        if isinstance(self.module, nn.Embedding):
            return Embedding.on(journey, feature)
        module = EmbeddingBag.on(journey, feature)
        module.include_last_offset = self.module.include_last_offset
        return module

    @staticmethod
    def restored(module: ShardedModule, weights: Mapping[str, nn.Parameter]) -> nn.Module | None:
        if not isinstance(module, Embedding | EmbeddingBag):
            return None
        settings: dict[str, Any] = {
            name: getattr(module, name) for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
        }
        if isinstance(module, Embedding):
            plain: Plain = nn.Embedding(module.num_embeddings, module.embedding_dim, **settings, device="meta")
        else:
            settings.update(mode=module.mode, include_last_offset=module.include_last_offset)
            plain = nn.EmbeddingBag(module.num_embeddings, module.embedding_dim, **settings, device="meta")
        plain.weight = weights[module.tables[0].name]
        return plain


class IdSite(PlainSite):
    """What `unshard` has put in place of a dynamic table, with ids that a matrix does not have."""

    @classmethod
    def of(cls, module: nn.Module, path: str) -> Self | None:
        return cls(module, [path]) if isinstance(module, IdEmbedding) else None

    def uses(self) -> list[Use]:
        return []

    def check(self) -> None:
        raise UnsupportedError(
            f"{self.path} is an IdEmbedding, which is a dynamic table already: put se.Embedding(..., dynamic=) or se.EmbeddingBag "
            f"in its place and give it the rows with load_rows(ids, weight), or keep it as it is with skip=[{self.path!r}]"
        )
