"""What the loop needs to know of each kind of job: its data, its model, its evaluation, and how they are shown."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
from rich.console import Console

from shardembed.comm import Comm, default_device
from shardembed.recipes import ctr_evaluate, evaluate, report
from shardembed.recipes.build import CtrJob, Job, SequenceJob, TrainingJob, build, build_ctr, build_sequence
from shardembed.recipes.common import JobConfig
from shardembed.recipes.config import Config
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data import sequences
from shardembed.recipes.data.bad import Dropped
from shardembed.recipes.data.chain import PlantedSequences
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.criteo import clicks
from shardembed.recipes.data.criteo.clicks import ClickData
from shardembed.recipes.data.criteo.encode import Encoder
from shardembed.recipes.data.interactions import Interactions, global_batches, scan
from shardembed.recipes.data.sequences import Sequences
from shardembed.recipes.metrics import History
from shardembed.recipes.models import ctr, sasrec, two_tower
from shardembed.recipes.models.index import ItemIndex
from shardembed.recipes.models.next_items import NextItems
from shardembed.recipes.sequence_config import SequenceConfig
from shardembed.tables import TableConfig


class Evaluated(Protocol):
    """What an evaluation found; `score` is what early stopping goes by, larger being better."""

    @property
    def score(self) -> float: ...

    def to_json(self) -> dict[str, Any]: ...

    def show(self, console: Console) -> None: ...


@dataclass(frozen=True)
class Task:
    """A kind of job on scanned data."""

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

    def batches(self, first: int = 0) -> Iterator[tuple[int, Any]]:
        """(epoch, global batch) from step `first` on, epoch after epoch.

        What a batch holds depends on data, seed and epoch alone, so the number of steps taken is all there is to know of the
        position.
        """
        began, skipped = divmod(first, max(1, self.steps_per_epoch))
        for epoch in range(began, self.config.train.epochs):
            for chunk in islice(self.epoch(epoch), skipped if epoch == began else 0, None):
                yield epoch, chunk

    def epoch(self, epoch: int) -> Iterator[Sized]:
        """The global batches of one epoch."""
        raise NotImplementedError

    def counted(self) -> str:
        """What the data are known by: hardly any other data have the same."""
        raise NotImplementedError

    def described(self) -> list[str]:
        """The data in words, for the user."""
        raise NotImplementedError

    def tables(self) -> list[TableConfig]:
        """Those of the model."""
        raise NotImplementedError

    def build(self) -> TrainingJob:
        """The model and what trains it. Collective."""
        raise NotImplementedError

    def evaluate(self, job: Any) -> Evaluated:
        """Collective."""
        raise NotImplementedError

    def save_vocabularies(self, folder: Path) -> None:
        """The values of the tables' rows, for whoever uses them after training. Not collective."""

    def reserved(self) -> str:
        """What row 0 of every table stands for, in words; empty where it is a row like others."""
        return ""

    def evaluates(self) -> str:
        """What an evaluation goes through, in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class TwoTowerTask(Task):
    config: Config
    data: Interactions

    def epoch(self, epoch: int) -> Iterator[Sized]:
        settings = self.config.train
        return global_batches(self.data, settings.global_batch_size, self.config.data.shuffle_buffer, settings.seed, epoch)

    def counted(self) -> str:
        data = self.data
        counts = zlib.crc32(data.item_counts.tobytes(), zlib.crc32(data.user_counts.tobytes()))
        return (
            f"{data.rows} interactions of {data.users} users and {data.items} items, held-out rows {int(data.held_row.sum())}, "
            f"counts {counts:08x}"
        )

    def described(self) -> list[str]:
        data = self.data
        counted = f"{data.rows:,} interactions of {data.users:,} users and {data.items:,} items; {len(data.held_users):,} held out"
        return [data.source.name, counted, *report.dropped_lines(data.dropped, data.rows)]

    def tables(self) -> list[TableConfig]:
        return two_tower.table_configs(self.config.model, self.data.users, self.data.items)

    def build(self) -> Job:
        return build(self.config, self.data)

    def evaluate(self, job: Job) -> Evaluated:
        return evaluate.evaluate(ItemIndex(job.model), self.data, self.config.eval, self.config.data.holdout_seed)

    def evaluates(self) -> str:
        return _users(len(self.data.held_users), self.config.eval.users)


@dataclass(frozen=True)
class CtrTask(Task):
    config: CtrConfig
    data: ClickData

    def epoch(self, epoch: int) -> Iterator[Sized]:
        settings = self.config.train
        return self.data.batches(settings.global_batch_size, self.config.data.shuffle_buffer, settings.seed, epoch)

    def counted(self) -> str:
        return self.data.describe()

    def described(self) -> list[str]:
        data, counted = self.data, self.data.counted
        names = [one.name for one in (data.source, data.validation) if one is not None]
        rate = counted.positives / counted.total
        rows = f"{data.training_rows:,} rows to train on, {data.validation_rows:,} for validation; {rate:.2%} are clicks"
        total = counted.total + (data.counted_validation.total if data.counted_validation else 0)
        return [*names, rows, *report.dropped_lines(data.dropped, total)]

    def tables(self) -> list[TableConfig]:
        encoder = Encoder.of(self.config.data, self.data)
        return ctr.table_configs(self.config.model, dict(zip(encoder.categories, encoder.sizes, strict=True)))

    def build(self) -> CtrJob:
        return build_ctr(self.config, self.data)

    def evaluate(self, job: CtrJob) -> Evaluated:
        return ctr_evaluate.evaluate(job, self.data, self.config.train.global_batch_size)

    def save_vocabularies(self, folder: Path) -> None:
        if self.data.vocabularies:
            folder.mkdir(exist_ok=True)
        for name, vocabulary in zip(self.config.data.categories, self.data.vocabularies, strict=False):
            vocabulary.save(folder / f"{quote(name, safe='')}.txt")

    def reserved(self) -> str:
        return "missing" if self.config.data.ids.kind == "hash" else "missing, or not in the vocabulary"

    def evaluates(self) -> str:
        return f"{self.data.validation_rows:,} rows"


@dataclass(frozen=True)
class SequenceTask(Task):
    config: SequenceConfig
    data: Sequences

    @property
    def training_rows(self) -> int:
        return len(self.data.training_users)

    def epoch(self, epoch: int) -> Iterator[Sized]:
        settings = self.config.train
        return self.data.batches(settings.global_batch_size, settings.seed, epoch)

    def counted(self) -> str:
        return self.data.describe()

    def described(self) -> list[str]:
        data = self.data
        counted = f"{data.rows:,} interactions of {data.users:,} users with {data.items:,} items"
        parts = f"{self.training_rows:,} sequences to train on, {len(data.held_users):,} last items held out"
        return [data.source.name, counted, parts, *report.dropped_lines(data.dropped, data.rows)]

    def tables(self) -> list[TableConfig]:
        return sasrec.table_configs(self.config.model, self.data.items)

    def build(self) -> SequenceJob:
        return build_sequence(self.config, self.data)

    def evaluate(self, job: SequenceJob) -> Evaluated:
        config, data = self.config, self.data
        ranker = NextItems(job.model, data, config.model.max_length)
        known = _ranked_by(data.source, data) if isinstance(data.source, PlantedSequences) else None
        return evaluate.evaluate(ranker, data, config.eval, config.train.seed, config.eval.repeats, known)

    def evaluates(self) -> str:
        return _users(len(self.data.held_users), self.config.eval.users)


def _ranked_by(chain: PlantedSequences, data: Sequences) -> evaluate.Oracle:
    """How the chain that made the data ranks the held-out items."""

    def positions(users: np.ndarray, held: np.ndarray, history: History) -> np.ndarray:
        return chain.positions(data.last(users, 1)[0], held, history)

    return positions


def _users(held: int, limit: int | None) -> str:
    return f"{min(held, limit or held):,} users"


def prepare(config: JobConfig, comm: Comm) -> Task:
    """Scan the data of a job. Collective."""
    if isinstance(config, CtrConfig):
        return CtrTask(config, clicks.scan(config.data, comm, default_device()))
    if isinstance(config, SequenceConfig):
        return SequenceTask(config, sequences.scan(open_source(config.data)))
    assert isinstance(config, Config)
    return TwoTowerTask(config, scan(open_source(config.data), config.data.holdout_seed))
