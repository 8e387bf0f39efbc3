"""Evaluation without training: a checkpoint's metrics on the configured data, and its predictions as Parquet files."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import shardembed as se
from shardembed.config.shown import printable
from shardembed.embeddings.of_run import checkpoint_of
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import CheckpointError, ConfigError, DataError, ShardEmbedError
from shardembed.recipes import config as settings
from shardembed.recipes.click_task import CtrTask
from shardembed.recipes.common import JobConfig
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.ctr_evaluate import predicted
from shardembed.recipes.ctr_metrics import probabilities
from shardembed.recipes.data.stream import rank_start
from shardembed.recipes.report import MODEL_NAMES
from shardembed.recipes.run_folder import CONFIG, VOCABULARIES, run_of
from shardembed.recipes.task import Task
from shardembed.recipes.tasks import prepare

SPLITS = ("validation_path", "split", "holdout_seed")  # settings of data that decide which rows are held out


def run(config: JobConfig, console: Console, checkpoint: str, predictions: str | None = None) -> dict[str, Any]:
    """Load a checkpoint into the configured model and evaluate it; nothing is trained and no run folder made. Collective.

    Args:
        checkpoint: the folder of a run (of which the best weights count once it is finished), of checkpoints, or of one checkpoint.
        predictions: a folder for the predictions of all rows that are evaluated: one file a rank, `part-00000.parquet` and so on,
            with the row's number in the data (from 0 over all files, bad rows that are left out not counted), its label and its
            prediction.

    Returns:
        The metrics, the same on every rank.

    Raises:
        ConfigError: predictions of a model that ranks items, or tables of other sizes than in the checkpoint.
        DataError: the predictions cannot be written.
        CheckpointError: the checkpoint cannot be loaded.
    """
    comm = se.init()
    if predictions is not None and not isinstance(config, CtrConfig):
        raise ConfigError(f"--predict: a {MODEL_NAMES[config.model.kind]} ranks items and predicts no clicks; leave --predict out")
    if predictions is not None and any(Path(predictions).glob("part-*.parquet")):  # on every rank, before any of them writes
        raise ConfigError(f"--predict: {predictions} holds predictions already; name another folder, or remove them")
    task = prepare(config, comm)
    folder = Path(checkpoint)
    run_folder = run_of(folder)
    with comm.preparing("the data"):
        if run_folder is not None:
            task = task.with_vocabularies(run_folder / VOCABULARIES)
    comm.agree("the data", [task.counted(), *(f"{table.name}: {table.num_embeddings}" for table in task.tables())])
    if comm.rank == 0 and run_folder is not None and (warning := _seen_in_training(config, run_folder)):
        print(printable(f"shardembed: {warning}"), file=sys.stderr, flush=True)
    job = task.build()
    with comm.preparing("the checkpoint"):
        folder = checkpoint_of(folder)
    comm.agree("the checkpoint", [folder.name])
    try:
        restored = se.load_checkpoint(folder, job.wrapped, weights_only=True)
    except CheckpointError as error:
        misfit = _misfit(task, folder)
        if misfit:
            raise ConfigError(f"--evaluate: the tables of this job do not fit those of {folder}: {misfit}") from error
        raise
    found = task.evaluate(job)
    if comm.rank == 0:
        console.print(f"{restored.path}, saved at step {restored.step}", soft_wrap=True, highlight=False, markup=False)
        found.show(console)
    if predictions is not None:
        assert isinstance(task, CtrTask)
        with comm.preparing("the predictions"):
            write_predictions(task, job, Path(predictions))
        comm.agree("the predictions", [])
    return {**found.to_json(), "checkpoint": str(restored.path), "step": restored.step, "ranks": comm.world_size}


def _seen_in_training(config: JobConfig, run_folder: Path) -> str:
    """Why rows that the run was trained on may be among those that are evaluated; empty where nothing says so."""
    try:
        then = settings.load(run_folder / CONFIG, named=False).data.model_dump(mode="json")
    except ConfigError:
        return ""
    now = config.data.model_dump(mode="json")
    if now.get("validation_path") or then["path"] != now["path"]:
        return ""
    name = next((name for name in SPLITS if then.get(name) != now.get(name)), None)
    if name is None:
        return ""
    was = then.get(name)
    if isinstance(was, dict):
        was = ", ".join(f"{key} {value}" for key, value in was.items() if value is not None and value is not False)
    return f"warning: the run was trained with data.{name} {was}: rows that it was trained on may be among those evaluated"


def _misfit(task: Task, folder: Path) -> str:
    """The first table whose rows are not as many as in the checkpoint, and what to do; empty where none is known."""
    with suppress(ShardEmbedError, OSError), StoredTables(folder) as stored:
        for table in task.tables():
            saved = stored.find(table.name).rows
            if table.dynamic is None and saved != table.num_embeddings:
                return (
                    f"table {table.name!r} has {table.num_embeddings:,} rows here and {saved:,} in the checkpoint. {_advice(task)}"
                )
    return ""


def _advice(task: Task) -> str:
    if not isinstance(task, CtrTask):
        return "Rows are counted from data.path: leave it as it was in training"
    if task.config.data.ids.kind == "hash":
        return "Set data.ids as it was in training"
    return "The vocabulary is counted from data.path: leave that as it was in training, and give new rows as data.validation_path"


def write_predictions(task: CtrTask, job: Any, folder: Path) -> None:
    """This rank's predictions, as one file that is there whole or not at all. Collective."""
    import pyarrow as pa
    from pyarrow import parquet

    comm = se.Comm.of()
    path = folder / f"part-{comm.rank:05d}.parquet"
    new = folder / f".{path.name}.new"
    schema = pa.schema([("row", pa.int64()), ("label", pa.int8()), ("prediction", pa.float32())])
    size = task.config.train.global_batch_size
    trouble: OSError | None = None
    writer = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writer = parquet.ParquetWriter(new, schema)
    except OSError as error:
        trouble = error
    # A rank that cannot write goes on, since predicting is collective.
    numbered = zip(predicted(job, task.data, size), task.data.held_numbers(size), strict=True)
    for (clicks, logits), numbers in numbered:
        first = rank_start(len(numbers), comm.rank, comm.world_size)
        columns = [numbers[first : first + len(clicks)], clicks.labels, probabilities(logits).astype(np.float32)]
        try:
            if writer is not None and trouble is None:
                writer.write_table(pa.table(columns, schema=schema))
        except OSError as error:
            trouble = error
    try:
        if writer is not None:
            writer.close()
        if trouble is None:
            os.replace(new, path)
    except OSError as error:
        trouble = trouble or error
    if trouble is not None:
        raise DataError(f"--predict: cannot write {path}: {trouble.strerror or trouble}") from trouble
