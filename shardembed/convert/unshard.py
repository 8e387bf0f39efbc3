"""`unshard(model)`: plain torch modules again, with the trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from shardembed.convert.find import KINDS
from shardembed.convert.resizing import forget_resizing
from shardembed.convert.shard import SharedLookup
from shardembed.convert.sites import swap
from shardembed.errors import ConfigError, UnsupportedError
from shardembed.modules.base import ShardedModule
from shardembed.modules.loading import CHUNK_BYTES
from shardembed.modules.lookup import Lookup
from shardembed.tables.table_config import TableConfig


@torch.no_grad()
def unshard(model: nn.Module, *, rank: int | None = None) -> nn.Module:
    """Put plain `nn.Embedding`s and `nn.EmbeddingBag`s, and TorchRec's collections, with the weights as they are now, where `shard`
    put sharded ones. In place; returns the model, or the plain module when `model` is itself sharded. Collective.

    Args:
        rank: the one rank that gets the weights; on the others the plain modules are on the meta device. Default: all ranks. A
            rank that gets them needs memory for all tables.

    Raises:
        ConfigError: nothing is sharded here. UnsupportedError: a sharded module has no plain counterpart; names its path.
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
    weights: dict[int, dict[str, nn.Parameter]] = {}  # modules that shared a table share the weight again
    result = model
    for module, paths in found.items():
        mine = weights.setdefault(id(module.journey), {})
        for table in module.tables:
            if table.name not in mine:
                mine[table.name] = _gathered(module, table, wanted=rank is None or rank == module.journey.comm.rank)
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


def _gathered(module: ShardedModule, table: TableConfig, wanted: bool) -> nn.Parameter:
    """The whole table, read a piece at a time; every rank makes the same calls."""
    device = module.journey.device if wanted else torch.device("meta")
    weight = torch.empty(table.num_embeddings, table.embedding_dim, dtype=table.dtype, device=device)
    step = max(1, CHUNK_BYTES // (table.embedding_dim * table.dtype.itemsize))
    for first in range(0, table.num_embeddings, step):
        # `rows` is collective: a rank that wants nothing asks for nothing, in as many calls.
        last = min(first + step, table.num_embeddings) if wanted else first
        piece = module.rows(table.name, torch.arange(first, last, device=module.journey.device))
        if wanted:
            weight[first:last] = piece
    number = module.journey.tables.index(table)
    return nn.Parameter(weight, requires_grad=number not in module.journey.freezing.frozen.tables)


def _restored(module: ShardedModule, weights: Mapping[str, nn.Parameter]) -> nn.Module:
    plain = next(plain for kind in KINDS if (plain := kind.restored(module, weights)) is not None)
    return plain.train(module.training)
