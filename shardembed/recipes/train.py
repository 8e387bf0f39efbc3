"""The training job, from a configuration to a summary: join, scan, build, resume, train, evaluate.

Every rank runs this with the same configuration. Each reads the whole stream of interactions and takes its part of every
global batch, so all ranks see the same number of steps and need not ask each other whether data are left. Rank 0 alone prints
and writes, but for checkpoints.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from rich.console import Console

import shardembed as se
from shardembed.comm import Comm, default_device
from shardembed.recipes import report, runs
from shardembed.recipes.build import Job, build
from shardembed.recipes.config import Config
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.interactions import Interactions, global_batches, scan
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.evaluate import Evaluation, evaluate
from shardembed.recipes.resolved import resolved_yaml
from shardembed.recipes.run_folder import RunFolder
from shardembed.recipes.runs import Run
from shardembed.recipes.saving import Progress, resume, save

REPORT_STEPS = 20  # losses are summed over the ranks this many at a time


def run(config: Config, console: Console, fresh: bool = False) -> dict[str, Any]:
    """Train and evaluate, from where an interrupted run with these settings was last saved. Collective over the job that `se.init`
    joins.

    Args:
        console: where rank 0 reports; other ranks print nothing.
        fresh: begin a new run whatever there is.

    Returns:
        The summary, the same on every rank except for `run_dir`, which only rank 0 knows.
    """
    comm = se.init()
    data = scan(open_source(config.data), config.data.holdout_seed)
    counted = _counted(data)
    _agree(comm, config, counted)
    job = build(config, data)
    told = console if comm.rank == 0 else Console(quiet=True)
    with runs.opened(comm, config, counted, fresh) as opened:
        _start(told, opened, config, data, job)
        progress = resume(told, opened, job, steps_of(config, data)) if opened.resumes else Progress()
        if opened.folder is not None and opened.resumes:
            opened.folder.keep_metrics(progress.step)
        trained = train(job, data, config, told, opened, progress)
        told.print(f"evaluating on {min(len(data.held_users), config.eval.users or data.users):,} users", highlight=False)
        began = time.monotonic()
        result = evaluate(job.model, data, config.eval, config.data.holdout_seed)
        summary = _summary(result, data, trained, opened.folder)
        if opened.folder is not None:
            opened.folder.log([{key: value for key, value in summary.items() if key != "losses"}])
            opened.folder.finish(summary)
            took = {"training": trained.seconds, "evaluation": time.monotonic() - began}
            report.show_result(console, result, took, trained.samples_per_second, str(opened.path))
    return summary


def steps_of(config: Config, data: Interactions) -> int:
    """Steps of the whole training."""
    steps = config.train.epochs * _steps_per_epoch(config, data)
    return min(steps, config.train.max_steps or steps)


def train(job: Job, data: Interactions, config: Config, console: Console, run: Run, begun: Progress) -> Progress:
    """The loop, from where it was left. Collective; where the run has a folder, writes each step's loss to it.

    A checkpoint comes after every so many steps and after the last, once all that it stands for has been written.
    """
    steps, every = steps_of(config, data), config.checkpoint.every_steps
    progress = begun
    waiting: list[torch.Tensor] = []
    records: list[dict[str, Any]] = []
    began = time.monotonic()
    with report.ProgressReport(console, steps) as shown:
        for step, (epoch, chunk) in zip(range(begun.step, steps), batches(data, config, begun.step), strict=False):
            waiting.append(job.step(chunk, step))
            records.append({"step": step + 1, "epoch": epoch + 1})
            progress = replace(progress, step=step + 1, epoch=epoch + 1, samples=progress.samples + len(chunk))
            saves = every is not None and ((step + 1) % every == 0 or step + 1 == steps)
            if (step + 1) % REPORT_STEPS and step + 1 < steps and not saves:
                continue
            found = _global_losses(waiting)
            waiting.clear()
            progress = replace(progress.with_losses(found), seconds=begun.seconds + time.monotonic() - began)
            shown.update(step + 1, found[-1], progress.samples_per_second)
            if run.folder is not None:
                run.folder.log(({**record, "loss": loss} for record, loss in zip(records, found, strict=True)), lasting=saves)
            records.clear()
            if saves:
                save(console, run, job, progress, config.checkpoint.keep)
    return replace(progress, seconds=begun.seconds + time.monotonic() - began)


def batches(data: Interactions, config: Config, first: int = 0) -> Iterator[tuple[int, Chunk]]:
    """(epoch, global batch) from step `first` on, epoch after epoch.

    What a batch holds depends on data, seed and epoch alone, so the number of steps taken is all there is to know of the position.
    """
    settings = config.train
    began, skipped = divmod(first, max(1, _steps_per_epoch(config, data)))
    for epoch in range(began, settings.epochs):
        found = global_batches(data, settings.global_batch_size, config.data.shuffle_buffer, settings.seed, epoch)
        for chunk in islice(found, skipped if epoch == began else 0, None):
            yield epoch, chunk


def _steps_per_epoch(config: Config, data: Interactions) -> int:
    return -(-data.training_rows // config.train.global_batch_size)


def _global_losses(losses: list[torch.Tensor]) -> list[float]:
    """The means over the ranks of several steps' losses, in one all-reduce."""
    comm = Comm.of()
    total = comm.all_reduce("mean losses", torch.stack(losses).to(torch.float64))
    return (total / comm.world_size).tolist()


def _counted(data: Interactions) -> str:
    """What the data are known by: hardly any other data have the same."""
    counts = zlib.crc32(data.item_counts.tobytes(), zlib.crc32(data.user_counts.tobytes()))
    return (
        f"{data.rows} interactions of {data.users} users and {data.items} items, held-out rows {int(data.held_row.sum())}, "
        f"counts {counts:08x}"
    )


def _agree(comm: Comm, config: Config, counted: str) -> None:
    """Ranks on several machines might have read different files; training would go wrong slowly rather than fail."""
    device = default_device()
    comm.agree("the configuration", resolved_yaml(config).split("\n"), device)
    comm.agree("the interactions", [counted], device)


def _start(console: Console, run: Run, config: Config, data: Interactions, job: Job) -> None:
    if run.folder is None:
        return
    plan = job.model.tables.plan
    itemsize = getattr(torch, config.model.table_dtype).itemsize
    held = report.holdings(plan, itemsize, config.optimizer.tables.build())
    run.folder.write("config.yaml", resolved_yaml(config))
    plan.save(run.path / "plan.json")
    report.show_start(console, config, data, plan, held)
    for note in run.notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def _summary(result: Evaluation, data: Interactions, trained: Progress, folder: RunFolder | None) -> dict[str, Any]:
    return {
        **result.to_json(),
        "losses": list(trained.losses),
        "samples_per_second": trained.samples_per_second,
        "run_dir": str(folder.path) if folder is not None else None,
        "ranks": se.world_size(),
        "steps": trained.step,
        "dropped_rows": data.dropped.kinds,
    }
