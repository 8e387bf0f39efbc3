"""`unshard(model)`: plain torch modules again, with the trained weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from shardembed.convert.shard import SharedLookup
from shardembed.convert.sites import Plain, swap
from shardembed.errors import ConfigError, UnsupportedError
from shardembed.modules import Embedding, EmbeddingBag
from shardembed.modules.base import ShardedModule

CHUNK_BYTES = 64 * 1024 * 1024


@torch.no_grad()
def unshard(model: nn.Module, *, rank: int | None = None) -> nn.Module:
    """Put plain `nn.Embedding`s and `nn.EmbeddingBag`s, with the weights as they are now, where `shard` put sharded ones. In
    place; returns the model, or the plain module when `model` is itself a sharded table. Collective.

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
        if not isinstance(module, Embedding | EmbeddingBag):
            raise UnsupportedError(
                f"{paths[0] or type(module).__name__}: a {type(module).__name__} has no plain counterpart; read its tables with "
                "rows(table, ids)"
            )
    weights: dict[tuple[int, str], nn.Parameter] = {}
    result = model
    for module, paths in found.items():
        assert isinstance(module, Embedding | EmbeddingBag)
        key = (id(module.journey), module.tables[0].name)
        if key not in weights:  # modules that shared a table share the weight again
            weights[key] = _gathered(module, wanted=rank is None or rank == module.journey.comm.rank)
        plain = _plain(module, weights[key])
        for path in paths:
            if path:
                swap(model, path, plain)
            else:
                result = plain
    for module in model.modules():
        for number, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, SharedLookup):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
    return result


def _gathered(module: Embedding | EmbeddingBag, wanted: bool) -> nn.Parameter:
    """The whole table, read a piece at a time; every rank makes the same calls."""
    table, journey = module.tables[0], module.journey
    device = journey.device if wanted else torch.device("meta")
    weight = torch.empty(table.num_embeddings, table.embedding_dim, dtype=table.dtype, device=device)
    step = max(1, CHUNK_BYTES // (table.embedding_dim * table.dtype.itemsize))
    for first in range(0, table.num_embeddings, step):
        last = min(first + step, table.num_embeddings) if wanted else first
        piece = module.rows(table.name, torch.arange(first, last, device=journey.device))
        if wanted:
            weight[first:last] = piece
    return nn.Parameter(weight, requires_grad=not table.frozen)


def _plain(module: Embedding | EmbeddingBag, weight: nn.Parameter) -> Plain:
    settings: dict[str, Any] = {
        name: getattr(module, name) for name in ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    }
    if isinstance(module, Embedding):
        plain: Plain = nn.Embedding(module.num_embeddings, module.embedding_dim, **settings, device="meta")
    else:
        settings.update(mode=module.mode, include_last_offset=module.include_last_offset)
        plain = nn.EmbeddingBag(module.num_embeddings, module.embedding_dim, **settings, device="meta")
    plain.weight = weight
    return plain.train(module.training)
