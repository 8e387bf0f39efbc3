"""What the loop needs to know of a job, whatever it trains on what: its data, its model, its evaluation, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.common import JobConfig
from shardembed.recipes.data import reading
from shardembed.recipes.data.bad import Dropped
from shardembed.recipes.data.part import Part
from shardembed.recipes.data.reading import Stream
from shardembed.recipes.data.stream import shuffled_at_once
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
    def evaluates_every(self) -> int | None:
        """Steps from one evaluation during training to the next; None where there are none."""
        every = self.config.eval.every_steps
        return self.steps_per_epoch if every == "epoch" else every

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation during training comes after so many steps. The last of them has one where others have."""
        every = self.evaluates_every
        return every is not None and (step == self.steps or step % every == 0)

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

    def counted_ids(self) -> dict[str, int]:
        """As `ids`, of all tables without a limit: may go through the data for it. Not collective."""
        return self.ids()

    def build(self) -> TrainingJob:
        """The model and what trains it. Collective."""
        raise NotImplementedError

    def evaluate(self, job: Any) -> Evaluated:
        """What the model reaches in the end. Collective."""
        raise NotImplementedError

    @property
    def validates(self) -> bool:
        """Data are held out for evaluations during training, which have no part in the result."""
        return False

    def validate(self, job: Any) -> Evaluated:
        """What it reaches on these. Collective."""
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
