"""What to plan for, however it is named: a workload file, a training configuration, or `module:function`.

The function takes nothing and returns a model with tables, a list of tables (`TableConfig`s or TorchRec's configs), or a whole
`Workload`. It runs under `torch.device("meta")` first, so that torch's own tables take no memory; large sharded collections are
best returned as their list of tables, since a collection makes its shards at once. Models do not say how many ids a sample has:
that is assumed, and can be given.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from shardembed.comm.comm import Comm
from shardembed.config import located
from shardembed.config.hints import nearest
from shardembed.convert.find import find_sites
from shardembed.convert.sites import tables_of
from shardembed.errors import ConfigError, ShardEmbedError
from shardembed.modules.base import ShardedModule
from shardembed.optim import TableOptimizer
from shardembed.planner import builtin, workload
from shardembed.planner.workload import Counts, TableLoad, Workload, workload_of
from shardembed.tables.table_config import TableConfig

if TYPE_CHECKING:
    from shardembed.recipes.config import Config
    from shardembed.recipes.ctr_config import CtrConfig
    from shardembed.recipes.data.interactions import Interactions
    from shardembed.recipes.data.sides import Side
    from shardembed.recipes.sequence_config import SequenceConfig

BATCH = 65_536  # samples a step over all ranks, where nothing says how many
IDS_A_BAG, IDS_A_LOOKUP = 10.0, 1.0  # of a pooled feature, and of one that is not, where nothing says how many
WORKLOAD_KEYS = ("global_batch_size", "tables", "table_groups")


def read(
    source: str,
    ranks: int,
    *,
    global_batch_size: int | None = None,
    ids_per_sample: float | Mapping[str, float] | None = None,
) -> Workload:
    """The workload that `source` names.

    Args:
        ranks: of the job, which the negatives of a training job depend on.
        global_batch_size: instead of what the source says.
        ids_per_sample: of a model's features, by name or for all; other sources say it themselves.

    Raises:
        ConfigError: it names nothing, or something else; what goes wrong in a function is told with its place.
    """
    if ":" in source and not Path(source).exists():
        found = of_object(_called(source), source, global_batch_size or BATCH, ids_per_sample)
    else:
        path = builtin.locate("workloads", source)
        found = of_training(path, ranks) if _is_training(path) else workload.load(path)
    if global_batch_size is None or global_batch_size == found.global_batch_size:
        return found
    return replace(found, global_batch_size=global_batch_size)


def of_object(
    built: Any, name: str, global_batch_size: int = BATCH, ids_per_sample: float | Mapping[str, float] | None = None
) -> Workload:
    """The workload of a model, a list of tables, or a workload.

    Raises:
        ConfigError: it is none of these, or has no tables.
    """
    if isinstance(built, Workload):
        return built
    if isinstance(built, nn.Module):
        tables = _tables_of(built)
    elif isinstance(built, list | tuple) and built:
        tables = [TableConfig.of(config) for config in built]
    else:
        raise ConfigError(
            f"{name} gave {type(built).__name__}; it must return a model, a list of tables (TableConfig or TorchRec's configs), or "
            "a Workload"
        )
    if ids_per_sample is None or isinstance(ids_per_sample, Mapping):
        assumed = {
            feature: IDS_A_LOOKUP if table.pooling_of(feature) is None else IDS_A_BAG
            for table in tables
            for feature in table.feature_names or ()
        }
        ids_per_sample = {**assumed, **(ids_per_sample or {})}
    return workload_of(tables, ids_per_sample, global_batch_size, name=name)


def of_training(path: str | Path, ranks: int) -> Workload:
    """The tables of a training job, with the counts of its data and the samples of an epoch: reads all of it once.

    Every rank looks up the step's negatives, all the same, beside its share of the batch's users and items.

    Raises:
        ConfigError, DataError: the configuration or its data is wrong.
    """
    from shardembed.recipes import config
    from shardembed.recipes.ctr_config import CtrConfig
    from shardembed.recipes.data.choose import open_numbered
    from shardembed.recipes.data.describe import with_features
    from shardembed.recipes.data.interactions import scan
    from shardembed.recipes.sequence_config import SequenceConfig

    settings = config.load(path)
    if isinstance(settings, CtrConfig):
        return _clicks(settings)
    if isinstance(settings, SequenceConfig):
        return _sequences(settings, ranks)
    source, ids = open_numbered(settings.data)
    data = with_features(scan(source, settings.data.holdout_seed, ids, settings.data.split), settings.data)
    return _two_towers(settings, data, ranks)


def _clicks(settings: CtrConfig) -> Workload:
    """Of a model that predicts clicks: its tables, and the counts of their rows in all of the data."""
    from shardembed.recipes.data.clicks.encode import Encoder
    from shardembed.recipes.data.clicks.scan import scan
    from shardembed.recipes.models.ctr import table_configs

    data = scan(settings.data, Comm.of())
    encoder = Encoder.of(settings.data, data.vocabularies)
    counts = encoder.counts(data.training())
    ids = settings.data.ids
    tables = table_configs(settings.model, settings.data.columns, encoder.sizes, ids if ids.kind == "dynamic" else None)
    optimizer = settings.optimizer.tables.build()
    loads = tuple(
        _load(table, (float(seen.sum()) / data.training_rows,), seen, optimizer) for table, seen in zip(tables, counts, strict=True)
    )
    wire_dtype = getattr(torch, settings.wire_dtype) if settings.wire_dtype else None
    return Workload(settings.name or "training", settings.train.global_batch_size, loads, wire_dtype, samples=data.training_rows)


def _sequences(settings: SequenceConfig, ranks: int) -> Workload:
    """Of a model that predicts the next item: one table, looked up with whole sequences and with negatives."""
    from shardembed.recipes.data.choose import open_numbered
    from shardembed.recipes.data.sequences import scan
    from shardembed.recipes.models.sasrec import table_configs

    data = scan(*open_numbered(settings.data), settings.data.split, settings.data.holdout_seed)
    model, batch = settings.model, settings.train.global_batch_size
    items, lengths = data.last(data.training_users, model.max_length + 1)
    negatives = model.negatives * ranks / batch  # a sequence
    asked = _with_negatives(np.bincount(items, minlength=data.items), data.item_counts, negatives * len(lengths))
    (table,) = table_configs(model, data.items, settings.data.any_ids)
    loads = (_load(table, (float(lengths.mean()), negatives), asked, settings.optimizer.tables.build()),)
    wire_dtype = getattr(torch, settings.wire_dtype) if settings.wire_dtype else None
    return Workload(settings.name or "training", batch, loads, wire_dtype, samples=len(lengths))


def _load(table: TableConfig, ids_per_sample: tuple[float, ...], seen: np.ndarray, optimizer: TableOptimizer) -> TableLoad:
    """seen: how often each row is asked for; of a dynamic table each id, of which those that are asked for most have the rows, and
    all of them where it has no limit.
    """
    ids = len(seen) if table.grows else None
    if table.dynamic is not None:
        most = np.sort(seen)[::-1][: table.num_embeddings]
        seen = np.concatenate([most, np.zeros(table.num_embeddings - len(most), np.int64)])
    return TableLoad(table, ids_per_sample, Counts(seen), optimizer=optimizer, ids=ids)


def _with_negatives(asked: np.ndarray, counts: np.ndarray, negatives: float) -> np.ndarray:
    """How often each item is asked for when so many negatives come on top, which are drawn by `counts`."""
    from shardembed.recipes.models.sampling import POWER, SMOOTHING

    popular = (counts + SMOOTHING) ** POWER
    return asked + np.rint(negatives * popular / popular.sum()).astype(np.int64)


def _two_towers(settings: Config, data: Interactions, ranks: int) -> Workload:
    from shardembed.recipes.models.two_tower import table_configs

    users, items = data.user_counts, data.item_counts
    batch, model, optimizer = settings.train.global_batch_size, settings.model, settings.optimizer.tables.build()
    negatives = model.negatives * ranks / batch  # a sample
    asked = _with_negatives(items, items, negatives * items.sum())
    user, item, *described = table_configs(model, len(users), len(items), settings.data.any_ids, data.known)
    loads = (_load(user, (1.0,), users, optimizer), _load(item, (1.0, negatives), asked, optimizer))
    seen = {**_seen(data.known.users, described, users), **_seen(data.known.items, described, asked)}
    samples = max(int(items.sum()), 1)
    loads += tuple(_load(table, (float(seen[table.name].sum()) / samples,), seen[table.name], optimizer) for table in described)
    wire_dtype = getattr(torch, settings.wire_dtype) if settings.wire_dtype else None
    return Workload(settings.name or "training", batch, loads, wire_dtype, samples=int(items.sum()))


def _seen(side: Side, tables: list[TableConfig], asked: np.ndarray) -> dict[str, np.ndarray]:
    """How often each row of the tables of features is asked for when users or items are so often; of a dynamic table each id."""
    from shardembed.recipes.data.lists import Lists
    from shardembed.recipes.models.side_features import table_ids

    by_name, found = {table.name: table for table in tables}, {}
    for feature, values in zip(side.features, side.values, strict=True):
        if not feature.has_table:
            continue
        table = by_name[feature.name]
        ids = table_ids(feature, values, table)
        times = np.repeat(asked, ids.lengths) if isinstance(ids, Lists) else asked
        flat = ids.values if isinstance(ids, Lists) else ids
        if table.dynamic is not None:
            flat = np.unique(flat, return_inverse=True)[1].reshape(-1)
        size = table.num_embeddings if table.dynamic is None else 0
        found[feature.name] = np.bincount(flat, times, minlength=size or 0).astype(np.int64)
    return found


def _is_training(path: Path) -> bool:
    from shardembed.recipes.config import Config

    keys = set(located.load(path).values)
    return not keys & set(WORKLOAD_KEYS) and bool(keys & set(Config.model_fields) - {"name", "optimizer", "wire_dtype"})


def _tables_of(model: nn.Module) -> list[TableConfig]:
    """The tables of a model: those of its sharded modules if it has any, else those that `shard` would convert."""
    sharded = [(path, module) for path, module in model.named_modules() if isinstance(module, ShardedModule)]
    if not sharded:
        whole = nn.ModuleDict({"model": model}) if not list(model.children()) or _is_site(model) else model
        return [table.config(exists=False) for table in tables_of(whole, find_sites(whole, ()))]
    found: dict[str, TableConfig] = {}
    for path, module in sharded:
        for table in module.tables:
            if found.setdefault(table.name, table) is not table:
                raise ConfigError(
                    f"{path or 'the model'}: a second table is named {table.name!r}; a workload needs names that differ"
                )
    return list(found.values())


def _is_site(model: nn.Module) -> bool:
    from shardembed.convert.find import KINDS

    return any(kind.of(model, "") is not None for kind in KINDS)


def _called(source: str) -> Any:
    """What the function returns."""
    where, _, name = source.rpartition(":")
    module = _module(where)
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{source}: there is no function {name!r} in {where}{nearest(name, names)}")
    try:
        try:
            with torch.device("meta"):
                return function()
        except (NotImplementedError, RuntimeError):  # it looks at values, which there are none of on the meta device
            return function()
    except ShardEmbedError:
        raise
    except Exception as error:
        raise ConfigError(f"{source}: the function failed: {type(error).__name__}: {error}{_place(error)}") from error


def _module(where: str) -> ModuleType:
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"shardembed planned {where}", where)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[module.__name__] = module  # dataclasses look themselves up there
            spec.loader.exec_module(module)
            return module
        if os.getcwd() not in sys.path:  # a console script does not have it
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(where)
    except Exception as error:
        raise ConfigError(f"{where}: cannot be imported: {type(error).__name__}: {error}{_place(error)}") from error


def _place(error: Exception) -> str:
    """Where it was raised: the last file and line of its traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
