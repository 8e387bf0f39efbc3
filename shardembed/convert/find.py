"""Which modules of a model are sites."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shardembed.convert.keyed import KeyedSite, RemappedSite
from shardembed.convert.plain import IdSite, PlainSite
from shardembed.convert.sites import Site
from shardembed.errors import ConfigError
from shardembed.modules.base import ShardedModule

KINDS: tuple[type[Site], ...] = (RemappedSite, KeyedSite, PlainSite, IdSite)


def find_sites(model: nn.Module, skip: Sequence[str]) -> list[Site]:
    """The sites of a model, in the order of its modules.

    Raises:
        ConfigError: there is none, the model is sharded already or is itself a table, or `skip` names a part of a collection.
        UnsupportedError: a module of TorchRec's that its sharded twin would not be like.
    """
    sites: dict[int, Site] = {}
    names: dict[str, None] = {}
    closed: tuple[str, ...] = ()  # what a site holds belongs to it
    for path, module in model.named_modules(remove_duplicate=False):
        if path.startswith(closed):
            continue
        if wrapper := _wrapper(module):
            raise ConfigError(f"{path or 'the model'} is wrapped by {wrapper}, which holds its tables already; shard() comes first")
        if isinstance(module, ShardedModule):
            raise ConfigError(f"{path or 'the model'} is sharded already; shard a model once, before wrapping it")
        site = next((site for kind in KINDS if (site := kind.of(module, path)) is not None), None)
        if site is None:
            continue
        # Before `skip` is looked at: the tables inside of a collection that is skipped are none of their own either.
        closed = (*closed, f"{path}.")
        names.update(dict.fromkeys([path, *(use.name for use in site.uses())]))
        if _skipped(site, skip):
            continue
        if not path:
            raise ConfigError(
                f"the model is itself a table, a {type(module).__name__}; build se.Embedding, se.EmbeddingBag or "
                "se.EmbeddingCollection instead of converting it, or put it into a module"
            )
        site.check()
        if id(module) in sites:
            sites[id(module)].paths.append(path)
        else:
            sites[id(module)] = site
    for pattern in skip:
        if not any(_matches(name, [pattern]) for name in names):
            raise ConfigError(f"skip= names {pattern!r}, which matches no table; the tables are {list(names)}")
    if not sites:
        raise ConfigError("the model has no nn.Embedding, nn.EmbeddingBag or TorchRec collection to shard")
    return list(sites.values())


def _skipped(site: Site, skip: Sequence[str]) -> bool:
    """Whether `skip` has the site, or all its tables.

    Raises:
        ConfigError: it has some of its tables.
    """
    if _matches(site.path, skip):
        return True
    names = [use.name for use in site.uses()]
    left = [name for name in names if not _matches(name, skip)]
    if left and len(left) < len(names):
        raise ConfigError(
            f"skip= names {sorted(set(names) - set(left))}, but {site.path} is converted as a whole or not at all: skip "
            f"{site.path!r}, or none of its tables"
        )
    return bool(names) and not left


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _wrapper(module: nn.Module) -> str:
    """What a module that holds its tables already was wrapped by; empty for others."""
    if isinstance(module, DistributedDataParallel):
        return "DistributedDataParallel"
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes most of a second, and its users have done so
    return "fully_shard" if fsdp is not None and isinstance(module, fsdp.FSDPModule) else ""
