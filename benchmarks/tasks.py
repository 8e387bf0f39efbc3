"""What is trained in a benchmark: a workload at a size that fits this machine, and batches of ids for it.

Built in are the three that the benchmark pages are about; any workload file of the planner's format is a task too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shardembed.optim import RowwiseAdagrad, TableOptimizer
from shardembed.planner import workload as workloads
from shardembed.planner.calibrate import stages
from shardembed.planner.workload import Counts, TableLoad, Workload, Zipf
from shardembed.tables.pooling import Pooling
from shardembed.tables.table_config import Constant, TableConfig

START = Constant(0.01)  # tables are made anew for every contender, and their first weights do not matter
Batch = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by feature: ids, and where each sample's begin and end, `[samples + 1]`


@dataclass(frozen=True)
class Task:
    """A workload, and the samples of one rank's batch.

    folded: ids follow Zipf's law without a last row, and are folded into the table; the figures in older pages are of such ids.
    """

    workload: Workload
    samples: int
    folded: bool = False

    @property
    def name(self) -> str:
        return self.workload.name

    @property
    def tables(self) -> list[TableConfig]:
        return [load.table for load in self.workload.tables]

    @property
    def pooled(self) -> bool:
        """Every feature is answered with one vector a bag."""
        return all(pooling is not None for pooling in self.poolings)

    @property
    def poolings(self) -> set[Pooling]:
        return {table.pooling_of(name) for table in self.tables for name in table.feature_names or ()}

    @property
    def features(self) -> list[str]:
        return [name for table in self.tables for name in table.feature_names or ()]

    def describe(self) -> dict[str, Any]:
        """The size of it, for a page."""
        ids = sum(sum(load.ids_per_sample) for load in self.workload.tables)
        widths = sorted({table.embedding_dim for table in self.tables})
        skews = sorted({_skew(load, self.folded) for load in self.workload.tables})
        return {
            "tables": len(self.tables),
            "rows": sum(table.num_embeddings for table in self.tables),
            "columns": " and ".join(map(str, widths)) if len(widths) < 4 else f"{widths[0]} to {widths[-1]}",
            "samples a rank": self.samples,
            "ids a sample": round(ids, 1),
            "ids": ", ".join(skews),
        }

    def optimized_by(self, optimizer: TableOptimizer) -> Task:
        loads = tuple(replace(load, optimizer=optimizer) for load in self.workload.tables)
        return replace(self, workload=replace(self.workload, tables=loads))

    def batches(self, rank: int, count: int, seed: int = 0) -> list[Batch]:
        """This rank's batches, as raw tensors; the same ids for every contender."""
        numbers = np.random.default_rng([seed, rank])
        draw = folded_zipf if self.folded else stages.by_skew
        drawn = (stages.batch_of(self.workload, self.samples, numbers, draw) for _ in range(count))
        return [{name: _with_offsets(given) for name, given in batch.items()} for batch in drawn]


def _skew(load: TableLoad, folded: bool) -> str:
    if isinstance(load.skew, Zipf):
        return f"Zipf {load.skew.exponent:g}{', folded' if folded else ''}"
    if isinstance(load.skew, workloads.Reuse):
        return f"repeating as in {load.skew.name}"
    return "as counted" if isinstance(load.skew, Counts) else "uniform"


def _with_offsets(given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(given, tuple):
        return given
    samples, length = given.shape
    return given.reshape(-1), torch.arange(0, samples * length + 1, length) if length else torch.zeros(
        samples + 1, dtype=torch.int64
    )


def folded_zipf(load: TableLoad, count: int, numbers: np.random.Generator) -> np.ndarray:
    """Ids by Zipf's law on all whole numbers, modulo the table's rows."""
    assert isinstance(load.skew, Zipf)
    return (numbers.zipf(load.skew.exponent, count) - 1) % load.table.num_embeddings


def alike(
    name: str, tables: int, rows: int, columns: int, samples: int, ids: int, pooling: Pooling = "sum", exponent: float = 1.2
) -> Task:
    """Tables of one size, with ids by Zipf's law."""
    loads = tuple(
        TableLoad(TableConfig(f"t{i}", rows, columns, pooling=pooling, init=START), (float(ids),), Zipf(exponent), "sorted")
        for i in range(tables)
    )
    return Task(Workload(name, samples, loads), samples, folded=True)


def pooled() -> Task:
    return alike("pooled", 8, 1_000_000, 64, 1024, 10)


def sequences() -> Task:
    return alike("sequences", 4, 1_000_000, 64, 1024, 10, pooling=None)


def overhead() -> Task:
    return alike("overhead", 26, 100_000, 16, 4, 1)


BUILT_IN = {"pooled": pooled, "sequences": sequences, "overhead": overhead}


def task_of(name_or_path: str, max_rows: int, samples: int | None) -> Task:
    """A built-in task, or a workload file (also one that comes along) cut to a size that fits. All with rowwise Adagrad, which
    every peer has.

    Args:
        max_rows: of a table; longer ones are cut. samples: of one rank's batch (default: the task's own; of a file 1,024).

    Raises:
        ConfigError: there is no such task or file, or the file is wrong.
    """
    if name_or_path in BUILT_IN:
        task = BUILT_IN[name_or_path]()
        task = replace(task, samples=samples or task.samples)
    else:
        whole = workloads.load(name_or_path)
        task = Task(whole, samples or min(1024, whole.global_batch_size))
    loads = tuple(cut(load, max_rows) for load in task.workload.tables)
    return replace(task, workload=replace(task.workload, tables=loads)).optimized_by(RowwiseAdagrad(lr=0.01))


def cut(load: TableLoad, max_rows: int) -> TableLoad:
    """The load with a table of at most `max_rows` rows."""
    rows = min(load.table.num_embeddings, max_rows)
    skew = Counts(load.skew.counts[:rows]) if isinstance(load.skew, Counts) else load.skew
    return replace(load, table=replace(load.table, num_embeddings=rows, init=START), skew=skew)


@dataclass(frozen=True)
class Flat:
    """A batch as peers take it: ids of all features in a row, and the length and start of each bag, by feature and sample."""

    ids: torch.Tensor
    lengths: torch.Tensor
    offsets: torch.Tensor

    @staticmethod
    def of(batch: Batch, features: Sequence[str], one_an_id: bool = False) -> Flat:
        """one_an_id: every id is a bag of its own."""
        flat = torch.cat([batch[name][0] for name in features])
        sizes = torch.ones_like(flat) if one_an_id else torch.cat([batch[name][1].diff() for name in features])
        offsets = torch.zeros(len(sizes) + 1, dtype=torch.int64)
        torch.cumsum(sizes, 0, out=offsets[1:])
        return Flat(flat, sizes, offsets)
