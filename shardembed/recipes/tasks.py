"""Which kind of job it is, and what the loop needs to know of those that rank items."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from shardembed.comm.comm import Comm
from shardembed.recipes import evaluate, report
from shardembed.recipes.build import Job, SequenceJob, build, build_sequence
from shardembed.recipes.click_task import CtrTask
from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import Config, DataConfig
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data import sequences
from shardembed.recipes.data.chain import PlantedSequences
from shardembed.recipes.data.choose import open_numbered
from shardembed.recipes.data.clicks import scan as clicks
from shardembed.recipes.data.describe import with_features
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.interactions import Interactions, global_batches, pairs_of, scan
from shardembed.recipes.data.numbering import Ids, Numbers
from shardembed.recipes.data.reading import Stream
from shardembed.recipes.data.sequences import Sequences
from shardembed.recipes.data.sides import Known, Side
from shardembed.recipes.metrics import History
from shardembed.recipes.models import sasrec, two_tower
from shardembed.recipes.models.index import ItemIndex
from shardembed.recipes.models.next_items import NextItems
from shardembed.recipes.sequence_config import SequenceConfig, SequenceDataConfig
from shardembed.recipes.task import Evaluated, Task
from shardembed.recipes.together import on_all
from shardembed.tables.table_config import TableConfig

if TYPE_CHECKING:
    from shardembed.recipes.former import Former


@dataclass(frozen=True)
class TwoTowerTask(Task):
    """Two towers on interactions.

    Attributes:
        config: of the job.
        data: interactions, of each user one held out.
    """

    config: Config
    data: Interactions

    @property
    def workers(self) -> int:
        return self.config.data.workers

    def stream(self) -> Stream:
        size, seed = self.config.train.global_batch_size, self.config.train.seed
        epoch = partial(global_batches, self.data.to_read(), size, self.config.data.shuffle_buffer, seed)
        return self._stream(epoch, pairs_of, self._burst(2 * 8))

    def counted(self) -> str:
        return self.data.describe()

    def described(self) -> list[str]:
        data = self.data
        counted = f"{data.rows:,} interactions of {data.users:,} users and {data.items:,} items; {len(data.held_rows):,} held out"
        known = [f"{len(one.features)} features of {name}" for name, one in _sides(data.known) if one.features]
        return [data.source.name, counted, *known, *report.dropped_lines(data.dropped, data.rows), *self._read_by()]

    def warnings(self) -> list[str]:
        data = self.data
        if self.config.data.path is None:
            return []
        return report.scattered_lines(data.rows, {"user": data.users, "item": data.items})

    def tables(self) -> list[TableConfig]:
        data = self.data
        return two_tower.table_configs(self.config.model, data.users, data.items, self.config.data.any_ids, data.known)

    def ids(self) -> dict[str, int]:
        data = self.data
        if data.ids is None:
            return {}
        return {"user": data.users, "item": data.items, **data.known.users.distinct(), **data.known.items.distinct()}

    def following(self, former: Former) -> TwoTowerTask:
        rows = {} if self.data.ids is not None else former.rows
        return replace(self, data=self.data.with_room(rows.get("user", 0), rows.get("item", 0)))

    def build(self) -> Job:
        return build(self.config, self.data)

    def evaluate(self, job: Job) -> Evaluated:
        return self._evaluated(job, validation=False)

    @property
    def validates(self) -> bool:
        return self.data.validation is not None

    def validate(self, job: Job) -> Evaluated:
        return self._evaluated(job, validation=True)

    def _evaluated(self, job: Job, validation: bool) -> Evaluated:
        data, index = self.data, ItemIndex(job.model, _numbers(self.data.ids))
        known = data.source.positions if isinstance(data.source, GeneratedInteractions) else None
        return evaluate.evaluate(index, data.questions(validation), self.config.eval, self.config.data.holdout_seed, known)

    def evaluates(self) -> str:
        return _users(len(self.data.held.users), self.config.eval.users)


@dataclass(frozen=True)
class SequenceTask(Task):
    """A model that predicts the next item.

    Attributes:
        config: of the job.
        data: sequences, of each user the last item held out.
    """

    config: SequenceConfig
    data: Sequences

    @property
    def training_rows(self) -> int:
        return len(self.data.training_users)

    def stream(self) -> Stream:
        settings = self.config.train
        epoch = partial(self.data.batches, settings.global_batch_size, settings.seed)
        return self._stream(epoch, partial(self.data.part, longest=self.config.model.max_length + 1))

    def counted(self) -> str:
        return self.data.describe()

    def described(self) -> list[str]:
        data = self.data
        counted = f"{data.rows:,} interactions of {data.users:,} users with {data.items:,} items"
        held = len(data.held.items) + (0 if data.validation is None else len(data.validation.items))
        parts = f"{self.training_rows:,} sequences to train on, {held:,} items held out"
        return [data.source.name, counted, parts, *report.dropped_lines(data.dropped, data.rows)]

    def warnings(self) -> list[str]:
        return [] if self.config.data.path is None else report.scattered_lines(self.data.rows, {"item": self.data.items})

    def tables(self) -> list[TableConfig]:
        return sasrec.table_configs(self.config.model, self.data.items, self.config.data.any_ids)

    def ids(self) -> dict[str, int]:
        return {} if self.data.ids is None else {"item": self.data.items}

    def following(self, former: Former) -> SequenceTask:
        return replace(self, data=self.data.with_room(0 if self.data.ids is not None else former.rows.get("item", 0)))

    def build(self) -> SequenceJob:
        return build_sequence(self.config, self.data)

    def evaluate(self, job: SequenceJob) -> Evaluated:
        return self._evaluated(job, validation=False)

    @property
    def validates(self) -> bool:
        return self.data.validation is not None

    def validate(self, job: SequenceJob) -> Evaluated:
        return self._evaluated(job, validation=True)

    def _evaluated(self, job: SequenceJob, validation: bool) -> Evaluated:
        config, data = self.config, self.data
        met = data.met(validation)
        ranker = NextItems(job.model, data, config.model.max_length, _numbers(data.ids), met)
        known = _ranked_by(data.source, data, met) if isinstance(data.source, PlantedSequences) else None
        return evaluate.evaluate(ranker, data.questions(validation), config.eval, config.train.seed, known)

    def evaluates(self) -> str:
        return _users(len(self.data.held.users), self.config.eval.users)


def _sides(known: Known) -> list[tuple[str, Side]]:
    return [("users", known.users), ("items", known.items)]


def _numbers(ids: Ids | None) -> Numbers | None:
    return None if ids is None else Numbers(ids.items)


def _ranked_by(chain: PlantedSequences, data: Sequences, met: np.ndarray) -> evaluate.Oracle:
    """How the chain that made the data ranks what is held out after the first `met` items of each user."""

    def positions(users: np.ndarray, wanted: History, history: History) -> np.ndarray:
        return chain.positions(data.last(users, 1, met)[0], wanted, history)

    return positions


def _users(held: int, limit: int | None) -> str:
    return f"{min(held, limit or held):,} users"


def prepare(config: JobConfig, comm: Comm) -> Task:
    """Scan the data of a job. Collective.

    Raises:
        DataError: on all ranks, where the data of one of them are unusable.
    """
    # Every kind of job: its settings decide which it is. A new one is a task above and a line here.
    if isinstance(config, CtrConfig):
        return CtrTask(config, clicks.scan(config.data, comm))
    if isinstance(config, SequenceConfig):
        return SequenceTask(config, on_all(comm, "scan the data", lambda: _scanned_sequences(config.data)))
    assert isinstance(config, Config)
    return TwoTowerTask(config, on_all(comm, "scan the data", lambda: _scanned(config.data)))


def _scanned(config: DataConfig) -> Interactions:
    source, ids = open_numbered(config)
    return with_features(scan(source, config.holdout_seed, ids, config.split), config)


def _scanned_sequences(config: SequenceDataConfig) -> Sequences:
    source, ids = open_numbered(config)
    return sequences.scan(source, ids, config.split, config.holdout_seed)
