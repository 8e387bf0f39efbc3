"""Evaluation without training: a checkpoint's metrics on the configured data, and its predictions as Parquet files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import shardembed as se
from shardembed.comm import default_device
from shardembed.errors import ConfigError, DataError
from shardembed.recipes.common import JobConfig
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.ctr_evaluate import predicted
from shardembed.recipes.data.stream import rank_start
from shardembed.recipes.report import MODELS
from shardembed.recipes.run_folder import CHECKPOINTS
from shardembed.recipes.tasks import CtrTask, prepare


def run(config: JobConfig, console: Console, checkpoint: str, predictions: str | None = None) -> dict[str, Any]:
    """Load a checkpoint into the configured model and evaluate it; nothing is trained and no run folder made. Collective.

    Args:
        checkpoint: the folder of a run, of checkpoints, or of one checkpoint.
        predictions: a folder for the predictions of all rows for validation: one file a rank, `part-00000.parquet` and so on,
            with the row's number in the data (from 0 over all files, bad rows that are left out not counted), its label and its
            prediction.

    Returns:
        The metrics, the same on every rank.

    Raises:
        ConfigError: predictions of a model that ranks items. DataError: the predictions cannot be written.
        CheckpointError: the checkpoint cannot be loaded.
    """
    comm = se.init()
    if predictions is not None and not isinstance(config, CtrConfig):
        raise ConfigError(f"--predict: a {MODELS[config.model.kind]} ranks items and predicts no clicks; leave --predict out")
    if predictions is not None and any(Path(predictions).glob("part-*.parquet")):  # on every rank, before any of them writes
        raise ConfigError(f"--predict: {predictions} holds predictions already; name another folder, or remove them")
    task = prepare(config, comm)
    comm.agree("the data", [task.counted()], default_device())
    job = task.build()
    folder = Path(checkpoint)
    folder = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    restored = se.load_checkpoint(folder, job.wrapped, weights_only=True)
    found = task.evaluate(job)
    if comm.rank == 0:
        console.print(f"{restored.path}, saved at step {restored.step}", soft_wrap=True, highlight=False, markup=False)
        found.show(console)
    if predictions is not None:
        assert isinstance(task, CtrTask)
        with comm.preparing("the predictions", default_device()):
            write_predictions(task, job, Path(predictions))
        comm.agree("the predictions", [], default_device())
    return {**found.to_json(), "checkpoint": str(restored.path), "step": restored.step, "ranks": comm.world_size}


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
    numbered = zip(predicted(job, task.data, size), task.data.validation_numbers(size), strict=True)
    for (clicks, logits), numbers in numbered:
        first = rank_start(len(numbers), comm.rank, comm.world_size)
        columns = [numbers[first : first + len(clicks)], clicks.labels, 1 / (1 + np.exp(-logits, dtype=np.float32))]
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
