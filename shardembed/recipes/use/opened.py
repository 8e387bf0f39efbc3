"""A run opened again: its settings, the checkpoint that counts, and the model with those weights, on one process or a job's ranks.

The model is built for the rows that the checkpoint has, so no data are read for it: data may be gone, and a run that went on from
another has rows for ids that its own data lack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import shardembed as se
from shardembed.checkpoint.format.manifest import read_manifest
from shardembed.comm.comm import Comm
from shardembed.config.paths import local
from shardembed.embeddings.stored import StoredTable, StoredTables
from shardembed.errors import ConfigError, DataError
from shardembed.recipes import config as settings
from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import Config
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data.interactions import NO_ROW, Interactions
from shardembed.recipes.data.naming import folder_of
from shardembed.recipes.data.numbering import Ids
from shardembed.recipes.data.sequences import Sequences
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.run_folder import CONFIG, NAMES
from shardembed.recipes.scoring import ClickScorer
from shardembed.recipes.sequence_config import SequenceConfig
from shardembed.recipes.tasks import SequenceTask, Task, TwoTowerTask
from shardembed.recipes.together import on_all
from shardembed.recipes.use.catalog import Catalog

NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class Opened:
    """A run with its model.

    Attributes:
        path: the run's folder.
        config: its settings.
        checkpoint: the one that the weights are from.
        step: of the checkpoint.
        model: with these weights, its tables cut over the ranks that there are now.
        users: of two towers, those with a row; of sequences and clicks none.
        items: likewise; of clicks none.
        scorer: what scores rows for a model of clicks; None of others.
    """

    path: Path
    config: JobConfig
    checkpoint: Path
    step: int
    model: Any
    users: Catalog
    items: Catalog
    scorer: ClickScorer | None = None

    @property
    def comm(self) -> Comm:
        """The ranks that it is open on."""
        return Comm.of()


def open_checkpoint(path: str | Path, step: int | None = None) -> Opened:
    """Open a run, at the checkpoint of a step where one is given. Collective over the job that `se.init` joins.

    Raises:
        ConfigError: on all ranks: `path` is no folder of a run.
        CheckpointError: on all ranks: it has no complete checkpoint, or the one that counts is damaged.
    """
    comm = se.init()
    run = local(path)
    config, checkpoint, users, items = on_all(comm, "open the run", lambda: _read(run, step))
    if isinstance(config, CtrConfig):
        scorer = ClickScorer.of_run(run, step)
        return Opened(run, config, checkpoint, _step_of(checkpoint), scorer.model, users, items, scorer)
    # The plan was for the ranks of the training; any plan computes the same.
    config = config.model_copy(update={"plan": type(config.plan).model_validate({})})
    task = _task(config, users, items)
    comm.agree("the run", [checkpoint.name, *(f"{table.name}: {table.num_embeddings}" for table in task.tables())])
    model = task.build().model
    restored = se.load_checkpoint(checkpoint, model, weights_only=True)
    return Opened(run, config, checkpoint, restored.step, model.eval(), users, items)


def config_of(run: Path) -> JobConfig:
    """
    Raises:
        ConfigError: `run` is no folder of a run.
    """
    if not (run / CONFIG).is_file():
        there = "is no folder of a run: it has no config.yaml" if run.is_dir() else "is not there"
        raise ConfigError(f"{run} {there}; give the folder that `shardembed train` named at its end, such as runs/NAME-DATE-TIME")
    return settings.load(run / CONFIG, named=False)


def _read(run: Path, step: int | None) -> tuple[JobConfig, Path, Catalog, Catalog]:
    config = config_of(run)
    with StoredTables(run, step) as stored:
        users, items = (_catalog(run, stored, what) for what in ("user", "item"))
    return config, stored.path.absolute(), users, items


def _step_of(checkpoint: Path) -> int:
    return read_manifest(checkpoint).step


def _catalog(run: Path, stored: StoredTables, what: str) -> Catalog:
    name = f"tables.{what}"
    found = stored.find(name) if name in stored.names else None
    folder = folder_of(run / NAMES, what)
    return Catalog(what, _ids(found), folder if any(folder.glob("*.parquet")) else None)


def _ids(table: StoredTable | None) -> np.ndarray:
    if table is None:
        return NONE
    return np.arange(table.rows) if table.ids is None else table.ids.numpy()


def _task(config: JobConfig, users: Catalog, items: Catalog) -> Task:
    """What makes the model, of data that nobody has read: the sizes are the checkpoint's."""
    nothing: Any = _Nothing()
    zeros = np.zeros(len(items), np.int64)
    ids = Ids(users.ids, items.ids) if config.data.any_ids is not None else None
    if isinstance(config, SequenceConfig):
        return SequenceTask(
            config, Sequences(nothing, len(items), NONE, np.zeros(1, np.int64), NONE, NONE, NONE, zeros, NONE, ids=ids)
        )
    assert isinstance(config, Config)
    unheld = np.full(len(users), NO_ROW)
    counts = np.zeros(len(users), np.int64)
    return TwoTowerTask(config, Interactions(nothing, len(users), len(items), (), unheld, unheld, counts, zeros, ids=ids))


class _Nothing:
    """A source without rows, in the place of data that the model does not need."""

    name = "no data"
    parts: Sequence[str] = ()

    def chunks(self, part: int) -> Iterator[Chunk]:
        raise DataError("a run that was opened for use has read no data")

    def place(self, column: int, value: int) -> str:
        return self.name
