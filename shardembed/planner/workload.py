"""What a model asks of its tables: sizes, ids a sample, and how often ids repeat. Written in code, or read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from shardembed.config import located
from shardembed.config.explain import explain
from shardembed.config.hints import nearest
from shardembed.config.located import Located
from shardembed.errors import ConfigError
from shardembed.optim import RowwiseAdagrad, TableOptimizer, refused
from shardembed.planner import builtin
from shardembed.planner.dense import Dense
from shardembed.planner.workload_sections import GroupSection, Order, ReuseFile, TableSection, WorkloadSection
from shardembed.tables.table_config import TableConfig


@dataclass(frozen=True)
class Uniform:
    """Every row is asked for equally often."""


@dataclass(frozen=True)
class Zipf:
    """The n-th most popular row is asked for in proportion to n^-exponent.

    Attributes:
        exponent: 0 asks for all rows alike.
    """

    exponent: float


@dataclass(frozen=True, eq=False)
class Reuse:
    """How often production traffic repeats rows: shares of touched rows, and of accesses, by how often a batch asks for them.

    Attributes:
        name: of the histogram.
        batch_size: samples of the batch that was looked at.
        ids: in that batch.
        distinct: rows in that batch.
        bounds: interval i has rows that are asked for at most `bounds[i]` times, and more than `bounds[i - 1]` times.
        touched_rows: share of the touched rows in each interval.
        accesses: share of the ids in each interval.
    """

    name: str
    batch_size: int
    ids: float
    distinct: float
    bounds: tuple[float, ...]
    touched_rows: tuple[float, ...]
    accesses: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Counts:
    """How often each row was asked for in the user's data. The order of rows is known then.

    Attributes:
        counts: by row number, int64 `[num_embeddings]`.
    """

    counts: NDArray[np.int64]


Skew = Uniform | Zipf | Reuse | Counts


@dataclass(frozen=True)
class TableLoad:
    """A table and its traffic.

    Attributes:
        table: its settings.
        ids_per_sample: mean ids a sample, one a feature of the table, in the order of its features.
        skew: how unequally rows are asked for.
        order: "sorted" where popular rows come first, "hashed" where they lie anywhere, "unknown": then rows are dealt out
            wherever they are cut, which is balanced in any order, and blocks are counted as if popular rows came first.
        optimizer: that updates it.
        ids: how many will have a row, of a table without a limit; None: as many as `table` is reckoned with.
    """

    table: TableConfig
    ids_per_sample: tuple[float, ...]
    skew: Skew = field(default_factory=Uniform)
    order: Order = "hashed"
    optimizer: TableOptimizer = field(default_factory=RowwiseAdagrad)
    ids: int | None = None

    def __post_init__(self) -> None:
        if problem := refused(self.optimizer):
            raise ConfigError(f"table {self.table.name!r}: {problem}")

    @property
    def rows(self) -> int:
        """That the table has or will have."""
        return self.table.num_embeddings if self.ids is None else self.ids


@dataclass(frozen=True)
class Workload:
    """All tables of a model.

    Attributes:
        name: of the model.
        global_batch_size: samples a step, over all ranks together.
        tables: with their traffic.
        wire_dtype: of vectors on the wire; None is each table's own.
        dense: the rest of the model, where somebody says what it is; no plan depends on it.
        samples: of an epoch, where somebody says how many.
    """

    name: str
    global_batch_size: int
    tables: tuple[TableLoad, ...]
    wire_dtype: torch.dtype | None = None
    dense: Dense | None = None
    samples: int | None = None


def workload_of(
    tables: Sequence[TableConfig],
    ids_per_sample: float | Mapping[str, float],
    global_batch_size: int,
    *,
    name: str = "model",
    skew: Skew | Mapping[str, Skew] | None = None,
    order: Order = "hashed",
    optimizer: TableOptimizer | Mapping[str, TableOptimizer] | None = None,
    wire_dtype: torch.dtype | None = None,
) -> Workload:
    """The workload of tables that exist as settings.

    Args:
        ids_per_sample: mean ids of a sample, by feature, or one number for all features.
        skew, optimizer: for all tables, or by table; by default `Uniform()` and `RowwiseAdagrad()`.

    Raises:
        ConfigError: a feature or table is named that is not there, or a feature is missing.
    """
    features = {feature for table in tables for feature in table.feature_names or ()}
    if isinstance(ids_per_sample, Mapping):
        for feature in sorted(features ^ set(ids_per_sample)):
            if feature in features:
                raise ConfigError(f"ids_per_sample does not say how many ids a sample has for feature {feature!r}")
            raise ConfigError(f"ids_per_sample names {feature!r}, which is no feature{nearest(feature, features)}")
    loads = []
    for table in tables:
        names = table.feature_names or ()
        lengths = tuple(float(ids_per_sample[f] if isinstance(ids_per_sample, Mapping) else ids_per_sample) for f in names)
        own_skew = skew.get(table.name) if isinstance(skew, Mapping) else skew
        own_optimizer = optimizer.get(table.name) if isinstance(optimizer, Mapping) else optimizer
        loads.append(TableLoad(table, lengths, own_skew or Uniform(), order, own_optimizer or RowwiseAdagrad()))
    for what, by_table in (("skew", skew), ("optimizer", optimizer)):
        for unknown in set(by_table if isinstance(by_table, Mapping) else ()) - {table.name for table in tables}:
            raise ConfigError(f"{what} names {unknown!r}, which is no table{nearest(unknown, [table.name for table in tables])}")
    return Workload(name, global_batch_size, tuple(loads), wire_dtype)


def load(name_or_path: str | Path) -> Workload:
    """Read a workload file, or one that comes along (`dlrm-dcnv2`, `synthetic-tiny`, `synthetic-small`, `synthetic-medium`).

    It has `global_batch_size`, and `tables` or `table_groups` or both. Files that it names (reuse histograms, counts) are
    looked for beside it.

    Raises:
        ConfigError: something in the file is wrong; all mistakes are listed, each with its place.
    """
    path = builtin.locate("workloads", name_or_path)
    document = located.load(path)
    try:
        section = WorkloadSection.model_validate(document.values)
    except ValidationError as error:
        raise explain(error, WorkloadSection, document) from None
    loads = _Reader(path.parent, document, section).loads()
    wire_dtype = getattr(torch, section.wire_dtype) if section.wire_dtype else None
    name, dense = section.name or path.stem, None if section.dense is None else section.dense.build()
    return Workload(name, section.global_batch_size, loads, wire_dtype, dense, section.samples_per_epoch)


def load_reuse(path: str | Path, name: str) -> Reuse:
    """The histogram called `name` from a file of them.

    Raises:
        ConfigError: something in the file is wrong, or it has no such histogram.
    """
    document = located.load(path)
    try:
        sets = ReuseFile.model_validate(document.values).root
    except ValidationError as error:
        raise explain(error, ReuseFile, document) from None
    if name not in sets:
        raise ConfigError(f"{path}: has no set {name!r}{nearest(name, sets)} (sets here: {', '.join(sets)})")
    found = sets[name]
    return Reuse(
        name,
        found.batch_size,
        float(found.ids),
        float(found.distinct_rows),
        found.upper_bounds,
        found.touched_rows,
        found.accesses,
    )


def load_counts(path: str | Path, num_embeddings: int) -> Counts:
    """A .npy file of whole numbers, one a row.

    Raises:
        ConfigError: it cannot be read, or is not that.
    """
    try:
        counts = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: no more memory than the file has bytes
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"{path}: cannot read counts: {error}; save them with numpy.save") from error
    if not isinstance(counts, np.ndarray) or counts.dtype.kind not in "iu" or counts.shape != (num_embeddings,):
        shape = f"{counts.dtype} of shape {counts.shape}" if isinstance(counts, np.ndarray) else "several arrays"
        raise ConfigError(f"{path}: counts must be one whole number a row, [{num_embeddings}] here, not {shape}")
    if counts.min() < 0 or counts.max() == 0:
        raise ConfigError(f"{path}: counts must not be negative, and some row must have been asked for")
    if counts.sum(dtype=np.float64) > 1 << 53:
        raise ConfigError(f"{path}: counts add up to {counts.sum(dtype=np.float64):.3g}, and at most 2^53 are counted exactly")
    return Counts(np.array(counts, np.int64))


@dataclass
class _Reader:
    """From sections to tables. What is said of a table goes before what is said of all."""

    folder: Path
    document: Located
    section: WorkloadSection
    skews: dict[tuple[str, ...], Skew] = field(default_factory=dict)  # so that tables with the same file share it

    def loads(self) -> tuple[TableLoad, ...]:
        found: dict[str, tuple[Any, ...]] = {}
        loads: list[TableLoad] = []
        for index, table in enumerate(self.section.tables):
            self._add(found, loads, ("tables", index, "name"), table.name, table)
        for index, group in enumerate(self.section.table_groups):
            for number in range(group.count):
                self._add(found, loads, ("table_groups", index, "name"), f"{group.name or f'g{index}'}_{number}", group)
        return tuple(loads)

    def _add(
        self,
        found: dict[str, tuple[Any, ...]],
        loads: list[TableLoad],
        path: tuple[str | int, ...],
        name: str,
        section: TableSection | GroupSection,
    ) -> None:
        place = self.document.place(path)
        if name in found:
            raise ConfigError(f"{place}: table {name!r} is already there, at {self.document.place(found[name])}; rename one")
        found[name] = path
        skew, order = self._skew(path[:-1], section)
        try:
            table = self._table(name, section)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        optimizer = section.optimizer or self.section.optimizer
        loads.append(TableLoad(table, section.ids_per_sample, skew, order, optimizer.build() if optimizer else RowwiseAdagrad()))

    def _table(self, name: str, section: TableSection | GroupSection) -> TableConfig:
        lengths = section.ids_per_sample
        names = (section.feature_names if isinstance(section, TableSection) else None) or (
            (name,) if len(lengths) == 1 else tuple(f"{name}.{feature}" for feature in range(len(lengths)))
        )
        dtype = section.dtype or self.section.dtype or "float32"
        own = section if "pooling" in section.model_fields_set else self.section
        policy = section.model_dump(include={"max_norm", "scale_grad_by_freq", "frozen"})
        return TableConfig(name, section.num_embeddings, section.embedding_dim, names, own.pooling, getattr(torch, dtype), **policy)

    def _skew(self, path: tuple[str | int, ...], own: TableSection | GroupSection) -> tuple[Skew, Order]:
        said = own if own.id_skew is not None or own.reuse or own.counts else self.section
        # Generators that draw by a power law number rows by popularity; real ids are hashed, or numbered as they come.
        order: Order = own.id_order or self.section.id_order or ("sorted" if said.id_skew else "hashed")
        if said.id_skew is not None:
            return (Zipf(said.id_skew) if said.id_skew else Uniform()), order
        if said.reuse is not None:
            key: tuple[str, ...] = ("reuse", said.reuse.file, said.reuse.set)
        elif said.counts is not None:
            key = ("counts", said.counts, str(own.num_embeddings))
        else:
            return Uniform(), order
        if key not in self.skews:
            where = self.document.place((*(path if said is own else ()), key[0]))
            file = self.folder / key[1]
            try:
                self.skews[key] = load_reuse(file, key[2]) if key[0] == "reuse" else load_counts(file, own.num_embeddings)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        return self.skews[key], order
