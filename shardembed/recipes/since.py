"""What a job does with the run that it begins from, and what it tells of that: `since.json` in its folder, and the summary.

begin    load the checkpoint, and evaluate yesterday's model on today's data before a step is taken
ended    count which ids of yesterday's still have rows
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

import shardembed as se
from shardembed.checkpoint.format.manifest import read_manifest
from shardembed.checkpoint.inventory import take
from shardembed.config import plain_json
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import CheckpointError, ConfigError, ShardEmbedError
from shardembed.recipes import report
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.carrying import Carried, carried
from shardembed.recipes.former import Former, table_of
from shardembed.recipes.run_folder import SINCE
from shardembed.recipes.runs import Run
from shardembed.recipes.task import Evaluated, Task


@dataclass(frozen=True)
class Since:
    """A job beside the run that it begins from.

    Attributes:
        former: that run.
        notes: what began otherwise than that run has ended, in words.
        before: the metrics of its model on the data of this job; None where it cannot be evaluated on them.
        tables: of each table, how many ids kept a row (`kept`), have one and had none (`new`), had one and have none (`gone`).
    """

    former: Former
    notes: tuple[str, ...] = ()
    before: dict[str, Any] | None = None
    tables: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        former = self.former
        about = {"run": str(former.run), "checkpoint": former.checkpoint.name, "step": former.step}
        return {**about, "notes": list(self.notes), "before": self.before, "tables": self.tables}

    def write(self, run: Run, after: dict[str, Any] | None = None) -> None:
        if run.folder is not None:
            folder, text = run.folder, json.dumps({**self.to_json(), "after": after}, indent=2)
            folder.attempt(SINCE, lambda: folder.write(SINCE, text))


def begin(console: Console, former: Former, run: Run, task: Task, job: TrainingJob) -> Since:
    """Let the model begin with what the former run has learned, and evaluate it before it learns more. Collective.

    Raises:
        ConfigError, CheckpointError: the checkpoint does not fit, or is damaged.
    """
    comm = se.Comm.of()
    held = take(job.model, comm.rank, comm.world_size)
    with comm.preparing("the checkpoint to begin from"):
        plan = carried(read_manifest(former.checkpoint).entries, held.items)
    comm.agree("the checkpoint to begin from", [former.checksum])
    otherwise = former.differs(task.config)
    options: dict[str, Any] = {"weights_only": True} if otherwise else {"optimizer": job.optimizer, "anew": True}
    try:
        restored = se.load_checkpoint(former.checkpoint, job.wrapped, **plan.as_options(), **options)
    except CheckpointError as error:
        raise ConfigError(
            f"--from: {former.run} cannot be begun from: {error}\nWidths and dtypes of tables stay as they were "
            "(model.embedding_dim, model.table_dtype)"
        ) from error
    found = Since(former, (*_notes(plan), *_otherwise(former, task, otherwise)))
    console.print(f"beginning from {former.run}, as saved at step {restored.step}", soft_wrap=True, markup=False, highlight=False)
    for note in found.notes:
        console.print(f"  {note}", soft_wrap=True, markup=False, highlight=False)
    if plan.whole:
        before = task.evaluate_former(job, former).to_json()
        found = replace(found, before=before)
        said = f"its model on {task.evaluates()} of these data: {report.in_words(before)}"
        console.print(said, soft_wrap=True, highlight=False, markup=False)
    else:
        console.print("its model cannot be evaluated on these data, since parts of this one are new", highlight=False)
    found.write(run)
    return found


def noted(former: Former, run: Run) -> Since:
    """As the run has noted it, which is resumed. Where that cannot be read, its metrics are lost, and nothing else."""
    try:
        told = plain_json.read(run.path / SINCE)
        return Since(former, tuple(map(str, told["notes"])), told["before"])
    except (OSError, ValueError, KeyError, TypeError):
        return Since(former)


def ended(since: Since, tables: se.EmbeddingCollection) -> Since:
    """With the counts of ids. Collective; rank 0 counts, and the others have none, nor has it where the former run is gone."""
    living = {table.name: tables.ids(table.name).cpu() for table in tables.tables if table.dynamic is not None}
    if se.rank() != 0:
        return since
    try:
        return replace(since, tables=_counts(since.former, tables, living))
    except (ShardEmbedError, OSError):  # its folder was removed, say, which is no reason to lose this run
        return since


def _counts(former: Former, tables: se.EmbeddingCollection, living: dict[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    counts = {}
    with StoredTables(former.checkpoint) as stored:
        there = {table_of(f"{name}.weight"): name for name in stored.names}
        for table in tables.tables:
            before = stored.find(there[table.name]) if table.name in there else None
            if table.name in living:
                ids = before.ids if before is not None else None
                counts[table.name] = _counted(torch.empty(0, dtype=torch.int64) if ids is None else ids, living[table.name])
            else:
                rows = min(before.rows if before is not None else 0, table.num_embeddings)
                counts[table.name] = {"kept": rows, "new": table.num_embeddings - rows, "gone": 0}
    return counts


def show(console: Console, since: Since, after: Evaluated) -> None:
    """What has become of ids and metrics since the former run."""
    for name, counts in since.tables.items():
        told = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
        console.print(f"ids of {name} since {since.former.run.name}: {told}", highlight=False, markup=False, soft_wrap=True)
    if since.before is not None:
        now = after.to_json()
        pairs = [(name, since.before.get(name), value) for name, value in now.items() if isinstance(value, float)]
        told = ", ".join(
            f"{name} {then:.4f} -> {value:.4f}" for name, then, value in pairs if isinstance(then, float) and then != value
        )
        console.print(f"before this training and after: {told}", highlight=False, markup=False, soft_wrap=True)


def _counted(before: torch.Tensor, now: torch.Tensor) -> dict[str, int]:
    kept = int(torch.isin(now, before).sum())
    return {"kept": kept, "new": len(now) - kept, "gone": len(before) - kept}


def _notes(plan: Carried) -> list[str]:
    said = {
        "more rows than there, at the end": plan.grown,
        "not there, begins fresh": plan.fresh,
        "of another shape there, begins fresh": plan.reshaped,
        "there and not here, left out": plan.left_out,
    }
    return [f"{table_of(key)}: {text}" for text, keys in said.items() for key in keys]


def _otherwise(former: Former, task: Task, otherwise: bool) -> list[str]:
    if not otherwise:
        return []
    then, now = (f"{one.optimizer.tables.name} and {one.optimizer.dense.name}" for one in (former.config, task.config))
    return [f"optimizers: {now} here and {then} there, so their state begins fresh, and so do the ages of ids"]
