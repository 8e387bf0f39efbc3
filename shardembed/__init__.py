"""shardembed: embedding tables cut over the ranks of a torch.distributed job, with the same numbers as `nn.Embedding`.

The public names, and nothing else.
"""

import importlib
from typing import TYPE_CHECKING, Any

from shardembed.config.collector import uncollected
from shardembed.config.cores import choose

choose()
with uncollected():
    from shardembed import errors, optim
    from shardembed._version import __version__
    from shardembed.comm.comm import Comm
    from shardembed.comm.job import init
    from shardembed.convert import shard, unshard
    from shardembed.errors import ShardEmbedError
    from shardembed.inputs.collate import Collate, Collated
    from shardembed.inputs.hashing import Hashing
    from shardembed.inputs.ids import IdBatch
    from shardembed.inputs.vocab import Vocabulary
    from shardembed.journey.clipping import clip_grad_norm_
    from shardembed.journey.loaders import synced
    from shardembed.journey.prefetch import prefetched
    from shardembed.modules import Embedding, EmbeddingBag, EmbeddingCollection, IdEmbedding
    from shardembed.optimizer import Optimizer
    from shardembed.store.wrappers import ignored
    from shardembed.tables.dynamic import LFU, LRU, TTL, Dynamic, MinCount, Probability
    from shardembed.tables.placement import (
        Placement,
        column_wise,
        grid,
        replicated,
        row_wise,
        table_row_wise,
        table_wise,
    )
    from shardembed.tables.plan import Plan, TablePlan
    from shardembed.tables.table_config import Constant, Normal, TableConfig, Uniform

if TYPE_CHECKING:
    from shardembed import testing
    from shardembed.checkpoint import (
        IdMap,
        PendingSave,
        Restored,
        async_save_checkpoint,
        checkpoints,
        convert_checkpoint,
        load_checkpoint,
        load_plain,
        newest_checkpoint,
        save_checkpoint,
    )
    from shardembed.embeddings import export_tables, neighbors, table_map
    from shardembed.inputs.hash64 import hash64
    from shardembed.inputs.names import Names
    from shardembed.observe import memory, profile
    from shardembed.recipes.from_python import TrainedRun, train
    from shardembed.recipes.use.run import OpenedRun, open_run

# What no step needs is imported when it is first asked for: it takes as long as all that a step does need.
_LATER = {
    "shardembed.testing": (),
    "shardembed.checkpoint": (
        "IdMap",
        "PendingSave",
        "Restored",
        "async_save_checkpoint",
        "checkpoints",
        "convert_checkpoint",
        "load_checkpoint",
        "load_plain",
        "newest_checkpoint",
        "save_checkpoint",
    ),
    "shardembed.embeddings": ("export_tables", "neighbors", "table_map"),
    "shardembed.inputs.hash64": ("hash64",),
    "shardembed.inputs.names": ("Names",),
    "shardembed.observe": ("memory", "profile"),
    "shardembed.recipes.from_python": ("TrainedRun", "train"),
    "shardembed.recipes.use.run": ("OpenedRun", "open_run"),
}

__all__ = [
    "LFU",
    "LRU",
    "TTL",
    "Collate",
    "Collated",
    "Comm",
    "Constant",
    "Dynamic",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingCollection",
    "Hashing",
    "IdBatch",
    "IdEmbedding",
    "IdMap",
    "MinCount",
    "Names",
    "Normal",
    "OpenedRun",
    "Optimizer",
    "PendingSave",
    "Placement",
    "Plan",
    "Probability",
    "Restored",
    "ShardEmbedError",
    "TableConfig",
    "TablePlan",
    "TrainedRun",
    "Uniform",
    "Vocabulary",
    "__version__",
    "async_save_checkpoint",
    "checkpoints",
    "clip_grad_norm_",
    "column_wise",
    "convert_checkpoint",
    "errors",
    "export_tables",
    "grid",
    "hash64",
    "ignored",
    "init",
    "load_checkpoint",
    "load_plain",
    "memory",
    "neighbors",
    "newest_checkpoint",
    "open_run",
    "optim",
    "prefetched",
    "profile",
    "rank",
    "replicated",
    "row_wise",
    "save_checkpoint",
    "shard",
    "synced",
    "table_map",
    "table_row_wise",
    "table_wise",
    "testing",
    "train",
    "unshard",
    "world_size",
]


def rank() -> int:
    """This process's rank in the job; 0 when it is alone."""
    return Comm.of().rank


def world_size() -> int:
    """The number of ranks of the job; 1 when this process is alone."""
    return Comm.of().world_size


def __getattr__(name: str) -> Any:
    for home, names in _LATER.items():
        if name in names or home == f"{__name__}.{name}":
            module = importlib.import_module(home)  # which puts itself among the names here
            return globals().setdefault(name, getattr(module, name) if name in names else module)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
