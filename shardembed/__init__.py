"""shardembed: embedding tables cut over the ranks of a torch.distributed job, with the same numbers as `nn.Embedding`.

The public names, and nothing else.
"""

from shardembed import errors, optim, testing
from shardembed._version import __version__
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
from shardembed.comm.comm import Comm
from shardembed.comm.job import init
from shardembed.convert import shard, unshard
from shardembed.embeddings import export_tables, neighbors, table_map
from shardembed.errors import ShardEmbedError
from shardembed.inputs.collate import Collate, Collated
from shardembed.inputs.hashing import Hashing
from shardembed.inputs.ids import IdBatch
from shardembed.inputs.vocab import Vocabulary
from shardembed.journey.clipping import clip_grad_norm_
from shardembed.journey.loaders import synced
from shardembed.journey.prefetch import prefetched
from shardembed.modules import Embedding, EmbeddingBag, EmbeddingCollection
from shardembed.observe import memory, profile
from shardembed.optimizer import Optimizer
from shardembed.store.wrappers import ignored
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

__all__ = [
    "Collate",
    "Collated",
    "Comm",
    "Constant",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingCollection",
    "Hashing",
    "IdBatch",
    "IdMap",
    "Normal",
    "Optimizer",
    "PendingSave",
    "Placement",
    "Plan",
    "Restored",
    "ShardEmbedError",
    "TableConfig",
    "TablePlan",
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
    "ignored",
    "init",
    "load_checkpoint",
    "load_plain",
    "memory",
    "neighbors",
    "newest_checkpoint",
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
    "unshard",
    "world_size",
]


def rank() -> int:
    """This process's rank in the job; 0 when it is alone."""
    return Comm.of().rank


def world_size() -> int:
    """The number of ranks of the job; 1 when this process is alone."""
    return Comm.of().world_size
