"""A run opened again: its settings, the checkpoint that counts, and the model with those weights, on one process or a job's ranks.

The model is built for the rows that the checkpoint has, so no data are read for it: data may be gone, and a run that went on from
another has rows for ids that its own data lack. Features of users and items are another matter: these stand in the data alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.config import plain_json
from shardembed.config.paths import local
from shardembed.config.shown import printable
from shardembed.embeddings.stored import StoredTable, StoredTables
from shardembed.errors import ConfigError, DataError
from shardembed.recipes import config as settings
from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import Config
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data.held import Held
from shardembed.recipes.data.interactions import Interactions
from shardembed.recipes.data.numbering import NOBODY, Ids, Numbers
from shardembed.recipes.data.sequences import Sequences
from shardembed.recipes.data.sides import NOTHING_KNOWN, Known, Side
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.run_folder import CONFIG, DATA
from shardembed.recipes.scoring import ClickScorer
from shardembed.recipes.sequence_config import SequenceConfig
from shardembed.recipes.task import Task
from shardembed.recipes.tasks import SequenceTask, TwoTowerTask, prepare
from shardembed.recipes.together import on_all
from shardembed.recipes.use.catalog import Catalog, kept_names

NONE = np.empty(0, np.int64)
START = np.zeros(1, np.int64)
UNHELD = Held(NONE, START, NONE)


@dataclass(frozen=True)
class Opened:
    """A run with its model.

    Attributes:
        path: the run's folder.
        config: its settings.
        checkpoint: the one that the weights are from.
        step: of the checkpoint.
        model: with these weights, its tables cut over the ranks that there are now.
        users: of two towers, those with a row, or with features; of sequences and clicks none.
        items: those with a row, or with features; of clicks none.
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
    config, checkpoint, saved_at, users, items = on_all(comm, "open the run", lambda: _read(run, step))
    if isinstance(config, CtrConfig):
        scorer = ClickScorer.of(run, config, checkpoint)
        return Opened(run, config, checkpoint, saved_at, scorer.model, users, items, scorer)
    # The plan was for the ranks of the training; any plan computes the same.
    config = config.model_copy(update={"plan": type(config.plan).model_validate({})})
    if isinstance(config, Config) and config.data.features:
        task, users, items = _described(run, config, users, items, comm)
    else:
        task = _task(config, users, items)
    comm.agree("the run", [checkpoint.name, *(f"{table.name}: {table.num_embeddings}" for table in task.tables())])
    model = task.build().model
    se.load_checkpoint(checkpoint, model, weights_only=True)
    return Opened(run, config, checkpoint, saved_at, model.eval(), users, items)


def config_of(run: Path) -> JobConfig:
    """
    Raises:
        ConfigError: `run` is no folder of a run.
    """
    if not (run / CONFIG).is_file():
        there = "is no folder of a run: it has no config.yaml" if run.is_dir() else "is not there"
        raise ConfigError(f"{run} {there}; give the folder that `shardembed train` named at its end, such as runs/NAME-DATE-TIME")
    return settings.load(run / CONFIG, named=False)


def _read(run: Path, step: int | None) -> tuple[JobConfig, Path, int, Catalog, Catalog]:
    """(settings, checkpoint, its step, users, items). The checkpoint is chosen here and nowhere else: of a run that goes on, there
    may be a newer one a moment later.
    """
    config = config_of(run)
    with StoredTables(run, step) as stored:
        users, items = (_catalog(run, stored, what) for what in ("user", "item"))
    return config, stored.path.absolute(), stored.manifest.step, users, items


def _catalog(run: Path, stored: StoredTables, what: str) -> Catalog:
    name = f"tables.{what}"
    found = stored.find(name) if name in stored.names else None
    return Catalog(what, _ids(found), kept_names(run, what))


def _ids(table: StoredTable | None) -> np.ndarray:
    if table is None:
        return NONE
    return np.arange(table.rows) if table.ids is None else table.ids.numpy()


def _task(config: JobConfig, users: Catalog, items: Catalog, known: Known = NOTHING_KNOWN) -> Task:
    """What makes the model, of data that nobody has read: the sizes are the checkpoint's."""
    nothing: Any = _Nothing()
    ids = Ids(users.ids, items.ids) if config.data.any_ids is not None else None
    of_items = np.zeros(len(items), np.int64)
    if isinstance(config, SequenceConfig):
        return SequenceTask(config, Sequences(nothing, len(items), NONE, START, UNHELD, None, NONE, of_items, NONE, ids=ids))
    assert isinstance(config, Config)
    of_users = np.zeros(len(users), np.int64)
    data = Interactions(nothing, len(users), len(items), (), NONE, UNHELD, None, of_users, of_items, ids=ids, known=known)
    return TwoTowerTask(config, data)


def _described(run: Path, config: Config, users: Catalog, items: Catalog, comm: Comm) -> tuple[Task, Catalog, Catalog]:
    """As `_task`, for a model that knows features of users and items, which the run's data say: those of the data can be asked for
    too, with a row or without. Collective.
    """
    data: Interactions = prepare(config, comm).data
    if comm.rank == 0 and _counted(run) not in ("", data.describe()):
        said = "the data have changed since, and features of users and items are those of now, not those that it was evaluated with"
        print(printable(f"shardembed: warning: {run}: {said}"), file=sys.stderr, flush=True)
    sides = []
    for catalog, side in ((users, data.known.users), (items, data.known.items)):
        if data.ids is None:
            there = np.arange(data.users if catalog is users else data.items)
            all_ids = catalog.ids
        else:
            there = data.ids.users if catalog is users else data.ids.items
            all_ids = np.union1d(catalog.ids, there)
        sides.append((replace(catalog, ids=all_ids), _values_of(side, there, all_ids)))
    (users, of_users), (items, of_items) = sides
    return _task(config, users, items, Known(of_users, of_items)), users, items


def _counted(run: Path) -> str:
    """What the data of the run were known by; empty where it does not tell."""
    try:
        return str(plain_json.read(run / DATA)["counted"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _values_of(side: Side, there: np.ndarray, ids: np.ndarray) -> Side:
    """The features of `ids`, of which nothing is known but of those that are `there`, in this order."""
    places = Numbers(there)(ids)
    places[places == NOBODY] = len(there)
    return Side(side.features, tuple(values[places] for values in side.with_room(1).values))


class _Nothing:
    """A source without rows, in the place of data that the model does not need."""

    name = "no data"
    parts: Sequence[str] = ()

    def chunks(self, part: int) -> Iterator[Chunk]:
        raise DataError("a run that was opened for use has read no data")

    def place(self, column: int, value: int) -> str:
        return self.name
