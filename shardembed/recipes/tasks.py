"""What the loop needs to know of each kind of job: its data, its model, its evaluation, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import numpy as np
from rich.console import Console

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.inputs.vocab import Vocabulary
from shardembed.recipes import ctr_evaluate, evaluate, report
from shardembed.recipes.build import CtrJob, Job, SequenceJob, TrainingJob, build, build_ctr, build_sequence
from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import Config, DataConfig
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data import reading, sequences
from shardembed.recipes.data.bad import Dropped
from shardembed.recipes.data.chain import PlantedSequences
from shardembed.recipes.data.choose import open_numbered
from shardembed.recipes.data.criteo import clicks
from shardembed.recipes.data.criteo.clicks import ClickData
from shardembed.recipes.data.criteo.encode import Encoder
from shardembed.recipes.data.describe import with_features
from shardembed.recipes.data.generate import GeneratedInteractions
from shardembed.recipes.data.interactions import Interactions, global_batches, pairs_of, scan
from shardembed.recipes.data.numbering import Ids, Numbers
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.reading import Stream
from shardembed.recipes.data.sequences import Sequences
from shardembed.recipes.data.sides import Known, Side
from shardembed.recipes.data.stream import shuffled_at_once
from shardembed.recipes.metrics import History
from shardembed.recipes.models import ctr, sasrec, two_tower
from shardembed.recipes.models.index import ItemIndex
from shardembed.recipes.models.next_items import NextItems
from shardembed.recipes.sequence_config import SequenceConfig, SequenceDataConfig
from shardembed.recipes.together import on_all
from shardembed.tables.table_config import TableConfig

if TYPE_CHECKING:
    from shardembed.recipes.former import Former

MOST_AHEAD = 32 << 20  # bytes that workers hold in shared memory, of which containers often have no more than 64 MB


class Evaluated(Protocol):
    """What an evaluation found; `score` is what early stopping goes by, larger being better."""

    @property
    def score(self) -> float: ...

    def to_json(self) -> dict[str, Any]: ...

    def show(self, console: Console) -> None: ...


@dataclass(frozen=True)
class Task:
    """A kind of job on scanned data.

    Attributes:
        config: of the job.
        data: what was scanned.
    """

    config: JobConfig
    data: Any

    @property
    def dropped(self) -> Dropped:
        return self.data.dropped

    @property
    def training_rows(self) -> int:
        return self.data.training_rows

    @cached_property
    def steps_per_epoch(self) -> int:
        return -(-self.training_rows // self.config.train.global_batch_size)

    @cached_property
    def steps(self) -> int:
        """Steps of the whole training."""
        steps = self.config.train.epochs * self.steps_per_epoch
        return min(steps, self.config.train.max_steps or steps)

    @property
    def workers(self) -> int:
        """Processes of each rank that read its data; with none, it does so itself."""
        return 0

    def parts(self, steps: range) -> Generator[Part, None, None]:
        """This rank's parts of the global batches of `steps`. Close it to end its workers.

        What a batch holds depends on data, seed and epoch alone, so the number of steps taken is all there is to know of the
        position.
        """
        return reading.read(self.stream(), steps, self.workers, default_device())

    def stream(self) -> Stream:
        """Where this rank's parts come from."""
        raise NotImplementedError

    def _stream(self, epoch: Callable[[int], Iterator[Any]], part: Callable[[Any, int, int], Part], burst: int = 1) -> Stream:
        comm = Comm.of()
        return Stream(epoch, part, self.steps_per_epoch, comm.rank, comm.world_size, burst)

    def _burst(self, row_bytes: int) -> int:
        """Batches that come at once from a shuffle, or as many of them as shall be made ahead."""
        size = self.config.train.global_batch_size
        part_bytes = size * row_bytes // Comm.of().world_size + 1
        return min(shuffled_at_once(self.config.data.shuffle_buffer) // size + 2, MOST_AHEAD // part_bytes)

    def _read_by(self) -> list[str]:
        return [f"read by {self.workers} worker process{'es' * (self.workers > 1)} of each rank"] if self.workers else []

    def counted(self) -> str:
        """What the data are known by: hardly any other data have the same."""
        raise NotImplementedError

    def described(self) -> list[str]:
        """The data in words, for the user."""
        raise NotImplementedError

    def warnings(self) -> list[str]:
        """What is odd about the data, in words. To be said before the tables are made, for which there may be no memory."""
        return []

    def tables(self) -> list[TableConfig]:
        """Those of the model."""
        raise NotImplementedError

    def ids(self) -> dict[str, int]:
        """How many distinct ones the data have for tables that take any, by the tables' names, where it is known."""
        return {}

    def build(self) -> TrainingJob:
        """The model and what trains it. Collective."""
        raise NotImplementedError

    def evaluate(self, job: Any) -> Evaluated:
        """What the model reaches in the end. Collective."""
        raise NotImplementedError

    def validate(self, job: Any) -> Evaluated:
        """What it reaches during training: on other data, where some are held out for that. Collective."""
        return self.evaluate(job)

    def following(self, former: Former) -> Task:
        """This, for tables that go on from those of another run: at least as large, with each value in the row that it has there.
        Not collective.

        Raises:
            DataError: a vocabulary cannot be read.
        """
        return self

    def evaluate_former(self, job: Any, former: Former) -> Evaluated:
        """The model as it comes from another run, on the data of this one. Collective."""
        return self.evaluate(job)

    def save_vocabularies(self, folder: Path) -> None:
        """The values of the tables' rows, for whoever uses them after training. Not collective."""

    def with_vocabularies(self, folder: Path) -> Task:
        """This, with the vocabularies that another run saved in `folder`, where there are any. Not collective."""
        return self

    def reserved(self) -> str:
        """What row 0 of every table stands for, in words; empty where it is a row like others."""
        return ""

    def evaluates(self) -> str:
        """What an evaluation goes through, in words."""
        raise NotImplementedError


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
        return {} if self.data.ids is None else {"user": self.data.users, "item": self.data.items}

    def following(self, former: Former) -> TwoTowerTask:
        rows = {} if self.data.ids is not None else former.rows
        return replace(self, data=self.data.with_room(rows.get("user", 0), rows.get("item", 0)))

    def build(self) -> Job:
        return build(self.config, self.data)

    def evaluate(self, job: Job) -> Evaluated:
        return self._evaluated(job, validation=False)

    def validate(self, job: Job) -> Evaluated:
        return self._evaluated(job, validation=self.data.validation is not None)

    def _evaluated(self, job: Job, validation: bool) -> Evaluated:
        data, index = self.data, ItemIndex(job.model, _numbers(self.data.ids))
        known = data.source.positions if isinstance(data.source, GeneratedInteractions) else None
        return evaluate.evaluate(index, data.questions(validation), self.config.eval, self.config.data.holdout_seed, known)

    def evaluates(self) -> str:
        return _users(len(self.data.held.users), self.config.eval.users)


@dataclass(frozen=True)
class CtrTask(Task):
    """A model that predicts clicks.

    Attributes:
        config: of the job.
        data: clicks.
    """

    config: CtrConfig
    data: ClickData

    @property
    def workers(self) -> int:
        return self.config.data.workers

    def stream(self) -> Stream:
        size, seed = self.config.train.global_batch_size, self.config.train.seed
        epoch = partial(self.data.batches, size, self.config.data.shuffle_buffer, seed)
        row_bytes = 8 * len(self.config.data.categories) + 4 * len(self.config.data.integers) + 4
        return self._stream(epoch, Encoder.of(self.config.data, self.data).part, self._burst(row_bytes))

    def counted(self) -> str:
        return self.data.describe()

    def described(self) -> list[str]:
        data, counted = self.data, self.data.counted
        names = [one.name for one in (data.source, data.validation) if one is not None]
        rate = counted.positives / counted.total
        rows = f"{data.training_rows:,} rows to train on, {data.validation_rows:,} for validation; {rate:.2%} are clicks"
        total = counted.total + (data.counted_validation.total if data.counted_validation else 0)
        return [*names, rows, *report.dropped_lines(data.dropped, total), *self._read_by()]

    def tables(self) -> list[TableConfig]:
        encoder = Encoder.of(self.config.data, self.data)
        sizes, ids = dict(zip(encoder.categories, encoder.sizes, strict=True)), self.config.data.ids
        return ctr.table_configs(self.config.model, sizes, ids if ids.kind == "dynamic" else None)

    def following(self, former: Former) -> CtrTask:
        then = self.with_vocabularies(former.vocabularies)
        if then is self:
            return self
        pairs = zip(then.data.vocabularies, self.data.vocabularies, strict=True)
        grown = tuple(old.extended(new, self.config.data.ids.max_size) for old, new in pairs)
        return replace(self, data=replace(self.data, vocabularies=grown))

    def evaluate_former(self, job: CtrJob, former: Former) -> Evaluated:
        """With the vocabularies that it had: what has no row there is one of the others."""
        then = self.with_vocabularies(former.vocabularies)
        return self.evaluate(replace(job, encoder=Encoder.of(self.config.data, then.data)))

    def build(self) -> CtrJob:
        return build_ctr(self.config, self.data)

    def evaluate(self, job: CtrJob) -> Evaluated:
        return ctr_evaluate.evaluate(job, self.data, self.config.train.global_batch_size)

    def save_vocabularies(self, folder: Path) -> None:
        if self.data.vocabularies:
            folder.mkdir(exist_ok=True)
        for name, vocabulary in zip(self.config.data.categories, self.data.vocabularies, strict=False):
            vocabulary.save(folder / f"{quote(name, safe='')}.txt")

    def with_vocabularies(self, folder: Path) -> CtrTask:
        """With those that another run saved, where it has them: rows of its tables stand for its values. Not collective.

        Raises:
            DataError: one cannot be read.
        """
        files = [folder / f"{quote(name, safe='')}.txt" for name in self.config.data.categories]
        if not self.data.vocabularies or not all(file.is_file() for file in files):
            return self
        return replace(self, data=replace(self.data, vocabularies=tuple(map(Vocabulary.load, files))))

    def reserved(self) -> str:
        return {"hash": "missing", "vocabulary": "missing, or not in the vocabulary"}.get(self.config.data.ids.kind, "")

    def evaluates(self) -> str:
        return f"{self.data.validation_rows:,} rows"


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

    def validate(self, job: SequenceJob) -> Evaluated:
        return self._evaluated(job, validation=self.data.validation is not None)

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
