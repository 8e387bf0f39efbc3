"""What the loop needs to know of a job that predicts clicks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from shardembed.comm.comm import Comm
from shardembed.recipes import ctr_evaluate, logistic, report
from shardembed.recipes.build import CtrJob, build_ctr
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data.clicks.encode import Encoder, load_vocabularies, looked_up, vocabulary_file
from shardembed.recipes.data.clicks.scan import ClickData
from shardembed.recipes.data.reading import Stream
from shardembed.recipes.logistic import Logistic
from shardembed.recipes.models import ctr
from shardembed.recipes.task import Evaluated, Task
from shardembed.tables.table_config import TableConfig

if TYPE_CHECKING:
    from shardembed.recipes.former import Former


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
        row_bytes = sum(4 if not one.has_table else 64 if one.kind == "ids" else 8 for one in self.config.data.columns) + 4
        return self._stream(epoch, Encoder.of(self.config.data, self.data.vocabularies).part, self._burst(row_bytes))

    def counted(self) -> str:
        return self.data.describe()

    def described(self) -> list[str]:
        data, counted = self.data, self.data.counted
        names = [one.name for one in (data.source, data.test) if one is not None]
        rate = counted.positives / counted.total
        held = f"{data.validation_rows:,} for validation, {data.test_rows:,} for the test"
        held = held if data.validates else f"{data.test_rows:,} for validation"
        rows = f"{data.training_rows:,} rows to train on, {held}; {rate:.2%} are clicks"
        total = counted.total + (data.counted_test.total if data.counted_test else 0)
        return [*names, rows, *report.dropped_lines(data.dropped, total), *self._read_by()]

    def tables(self) -> list[TableConfig]:
        data, sizes = self.config.data, Encoder.of(self.config.data, self.data.vocabularies).sizes
        return ctr.table_configs(self.config.model, data.columns, sizes, data.ids if data.ids.kind == "dynamic" else None)

    def counted_ids(self) -> dict[str, int]:
        growing = {table.name for table in self.tables() if table.grows}
        if not growing:
            return {}
        encoder = Encoder.of(self.config.data, self.data.vocabularies)
        counts = zip(encoder.sizes, encoder.counts(self.data.training()), strict=True)
        return {name: len(seen) for name, seen in counts if name in growing}

    def following(self, former: Former) -> CtrTask:
        if not self.data.vocabularies:
            return self
        most = self.config.data.ids.max_size
        pairs = zip(looked_up(self.config.data), self.data.vocabularies, strict=True)
        grown = tuple(former.vocabulary(name).extended(new, most) if name in former.rows else new for name, new in pairs)
        return replace(self, data=replace(self.data, vocabularies=grown))

    def evaluate_former(self, job: CtrJob, former: Former) -> Evaluated:
        """With the vocabularies that it had: what has no row there is one of the others."""
        then = self.with_vocabularies(former.vocabularies)
        return self.evaluate(replace(job, encoder=Encoder.of(self.config.data, then.data.vocabularies)))

    def build(self) -> CtrJob:
        return build_ctr(self.config, self.data)

    def evaluate(self, job: CtrJob) -> Evaluated:
        return self._evaluated(job, validation=False)

    @property
    def validates(self) -> bool:
        return self.data.validates

    def validate(self, job: CtrJob) -> Evaluated:
        return self._evaluated(job, validation=True)

    def _evaluated(self, job: CtrJob, validation: bool) -> Evaluated:
        return ctr_evaluate.evaluate(job, self.data, self.config.train.global_batch_size, self._logistic, validation)

    @cached_property
    def _logistic(self) -> Logistic:
        """What models are compared with. Collective the first time."""
        return logistic.fit(self.data, Encoder.of(self.config.data, self.data.vocabularies), Comm.of())

    def save_vocabularies(self, folder: Path) -> None:
        if self.data.vocabularies:
            folder.mkdir(exist_ok=True)
        for name, vocabulary in zip(looked_up(self.config.data), self.data.vocabularies, strict=False):
            vocabulary.save(vocabulary_file(folder, name))

    def with_vocabularies(self, folder: Path) -> CtrTask:
        """With those that another run saved, where it has them: rows of its tables stand for its values. Not collective.

        Raises:
            DataError: one cannot be read.
        """
        if not self.data.vocabularies or not all(vocabulary_file(folder, name).is_file() for name in looked_up(self.config.data)):
            return self
        return replace(self, data=replace(self.data, vocabularies=load_vocabularies(self.config.data, folder)))

    def reserved(self) -> str:
        return {"hash": "missing", "vocabulary": "missing, or not in the vocabulary"}.get(self.config.data.ids.kind, "")

    def evaluates(self) -> str:
        return f"{self.data.test_rows:,} rows"
