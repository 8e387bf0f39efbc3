"""`unshard(model)`: plain torch modules again, with the trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from shardembed.convert.find import KINDS
from shardembed.convert.resizing import forget_resizing
from shardembed.convert.shard import SharedLookup
from shardembed.convert.sites import swap
from shardembed.errors import ConfigError, UnsupportedError
from shardembed.modules.base import ShardedModule
from shardembed.modules.by_id import speaker
from shardembed.modules.id_embedding import IdEmbedding
from shardembed.modules.loading import CHUNK_BYTES
from shardembed.modules.lookup import Lookup
from shardembed.modules.single import Embedding, EmbeddingBag
from shardembed.tables.table_config import TableConfig


@torch.no_grad()
def unshard(model: nn.Module, *, rank: int | None = None) -> nn.Module:
    """Put plain `nn.Embedding`s and `nn.EmbeddingBag`s, and TorchRec's collections, with the weights as they are now, where `shard`
    put sharded ones. A dynamic table becomes an `IdEmbedding`: its ids and their rows. In place; returns the model, or the plain
    module when `model` is itself sharded. Collective.

    Args:
        rank: the one rank that gets the weights; on the others the plain modules are on the meta device. Default: all ranks. A
            rank that gets them needs memory for all tables.

    Raises:
        ConfigError: nothing is sharded here. UnsupportedError: a sharded module has no plain counterpart, such as a collection of
            TorchRec's with a dynamic table; names its path.
    """
    found: dict[ShardedModule, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, ShardedModule):
            found.setdefault(module, []).append(path)
    if not found:
        raise ConfigError("the model has no sharded table")
    for module, paths in found.items():
        if not isinstance(module, Lookup):
            raise UnsupportedError(
                f"{paths[0] or type(module).__name__}: a {type(module).__name__} has no plain counterpart; read its tables with "
                "rows(table, ids)"
            )
        if _is_dynamic(module) and not isinstance(module, Embedding | EmbeddingBag):
            raise UnsupportedError(
                f"{paths[0]}: TorchRec's collections take row numbers, and a table of this one is dynamic; read it with "
                "ids(table) and rows(table, ids)"
            )
    weights: dict[int, dict[str, _Taken]] = {}  # modules that shared a table share the weight again
    result = model
    for module, paths in found.items():
        mine = weights.setdefault(id(module.journey), {})
        for table in module.tables:
            if table.name not in mine:
                mine[table.name] = _taken(module, table, wanted=rank is None or rank == module.journey.comm.rank)
        plain = _restored(module, mine)
        for path in paths:
            if path:
                swap(model, path, plain)
            else:
                result = plain
    forget_resizing(model)
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, SharedLookup):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    return result


@dataclass(frozen=True)
class _Taken:
    """A table on this rank. ids: of its rows, of a dynamic one; else None."""

    weight: nn.Parameter
    ids: torch.Tensor | None


def _taken(module: ShardedModule, table: TableConfig, wanted: bool) -> _Taken:
    """The whole table, read a piece at a time; every rank makes the same calls."""
    here = module.journey.device
    device = here if wanted else torch.device("meta")
    ids = None if table.dynamic is None else module.ids(table.name)
    count = table.num_embeddings if ids is None else ids.numel()
    weight = torch.empty(count, table.embedding_dim, dtype=table.dtype, device=device)
    step = max(1, CHUNK_BYTES // (table.embedding_dim * table.dtype.itemsize))
    for first in range(0, count, step):
        # `rows` is collective: a rank that wants nothing asks for nothing, in as many calls.
        last = min(first + step, count) if wanted else first
        piece = module.rows(table.name, torch.arange(first, last, device=here) if ids is None else ids[first:last])
        if wanted:
            weight[first:last] = piece
    number = module.journey.tables.index(table)
    parameter = nn.Parameter(weight, requires_grad=number not in module.journey.freezing.frozen.tables)
    return _Taken(parameter, None if ids is None else ids.to(device))


def _is_dynamic(module: ShardedModule) -> bool:
    return any(table.dynamic is not None for table in module.tables)


def _restored(module: ShardedModule, taken: Mapping[str, _Taken]) -> nn.Module:
    if isinstance(module, Embedding | EmbeddingBag) and _is_dynamic(module):
        return _by_id(module, taken[module.tables[0].name]).train(module.training)
    weights = {name: table.weight for name, table in taken.items()}
    plain = next(plain for kind in KINDS if (plain := kind.restored(module, weights)) is not None)
    return plain.train(module.training)


def _by_id(module: Embedding | EmbeddingBag, taken: _Taken) -> IdEmbedding:
    (table,) = module.tables
    keys = speaker(module.journey, module.journey.tables.index(table))
    assert keys is not None
    assert taken.ids is not None
    own = replace(table, feature_names=[module.feature.name], pooling=module.feature.pooling)
    plain = IdEmbedding(own, keys.seed, isinstance(module, EmbeddingBag) and module.include_last_offset)
    plain.fill(taken.ids, taken.weight)
    return plain
