"""The training job, from a configuration to a summary: join, scan, build, train, evaluate.

Every rank runs this with the same configuration. Each reads the whole stream of interactions and takes its part of every
global batch, so all ranks see the same number of steps and need not ask each other whether data are left. Rank 0 alone prints
and writes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

import shardembed as se
from shardembed.comm import Comm, default_device
from shardembed.recipes import report
from shardembed.recipes.build import Job, build
from shardembed.recipes.config import Config
from shardembed.recipes.data.choose import open_source
from shardembed.recipes.data.interactions import Interactions, global_batches, scan
from shardembed.recipes.data.source import Chunk
from shardembed.recipes.evaluate import Evaluation, evaluate
from shardembed.recipes.resolved import resolved_yaml
from shardembed.recipes.run_folder import RunFolder

LOSSES_KEPT = 20  # of the first steps, for the summary
REPORT_STEPS = 20  # losses are summed over the ranks this many at a time


@dataclass(frozen=True)
class Trained:
    """What the loop gives back: every step's global loss, and what it took."""

    losses: list[float]
    samples: int
    seconds: float

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(self.seconds, 1e-9)


def run(config: Config, console: Console) -> dict[str, Any]:
    """Train and evaluate. Collective over the job that `se.init` joins.

    Args:
        console: where rank 0 reports; other ranks print nothing.

    Returns:
        The summary, the same on every rank except for `run_dir`, which only rank 0 knows.
    """
    comm = se.init()
    data = scan(open_source(config.data), config.data.holdout_seed)
    _agree(comm, config, data)
    job = build(config, data)
    folder = RunFolder(config.run_dir, config.name or "run") if comm.rank == 0 else None
    if folder is not None:
        _start(console, folder, config, data, job)
    trained = train(job, data, config, console if comm.rank == 0 else None, folder)
    if comm.rank == 0:
        console.print(f"evaluating on {min(len(data.held_users), config.eval.users or data.users):,} users", highlight=False)
    began = time.monotonic()
    result = evaluate(job.model, data, config.eval, config.data.holdout_seed)
    summary = _summary(result, data, trained, folder)
    if folder is not None:
        folder.log([{key: value for key, value in summary.items() if key != "losses"}])
        took = {"training": trained.seconds, "evaluation": time.monotonic() - began}
        report.show_result(console, result, took, trained.samples_per_second, str(folder.path))
    return summary


def train(job: Job, data: Interactions, config: Config, console: Console | None, folder: RunFolder | None) -> Trained:
    """The loop. Collective; with a console, reports to it, and with a folder, writes each step's loss."""
    size, epochs = config.train.global_batch_size, config.train.epochs
    steps = epochs * -(-data.training_rows // size)
    steps = min(steps, config.train.max_steps or steps)
    losses: list[float] = []
    waiting: list[torch.Tensor] = []
    records: list[dict[str, Any]] = []
    samples = 0
    began = time.monotonic()
    with report.ProgressReport(console or Console(quiet=True), steps) as progress:
        for step, (epoch, chunk) in zip(range(steps), _epochs(data, config), strict=False):
            waiting.append(job.step(chunk, step))
            records.append({"step": step + 1, "epoch": epoch + 1})
            samples += len(chunk)
            if (step + 1) % REPORT_STEPS and step + 1 < steps:
                continue
            found = _global_losses(waiting)
            waiting.clear()
            progress.update(step + 1, found[-1], samples / (time.monotonic() - began))
            if folder is not None:
                folder.log([{**record, "loss": loss} for record, loss in zip(records, found, strict=True)])
            records.clear()
            losses += found
    return Trained(losses, samples, time.monotonic() - began)


def _epochs(data: Interactions, config: Config) -> Iterator[tuple[int, Chunk]]:
    """(epoch, global batch), epoch after epoch."""
    settings = config.train
    for epoch in range(settings.epochs):
        for chunk in global_batches(data, settings.global_batch_size, config.data.shuffle_buffer, settings.seed, epoch):
            yield epoch, chunk


def _global_losses(losses: list[torch.Tensor]) -> list[float]:
    """The means over the ranks of several steps' losses, in one all-reduce."""
    comm = Comm.of()
    total = comm.all_reduce("mean losses", torch.stack(losses).to(torch.float64))
    return (total / comm.world_size).tolist()


def _agree(comm: Comm, config: Config, data: Interactions) -> None:
    """Ranks on several machines might have read different files; training would go wrong slowly rather than fail."""
    counted = f"{data.rows} interactions of {data.users} users and {data.items} items, held-out rows {int(data.held_row.sum())}"
    device = default_device()
    comm.agree("the configuration", resolved_yaml(config).split("\n"), device)
    comm.agree("the interactions", [counted], device)


def _start(console: Console, folder: RunFolder, config: Config, data: Interactions, job: Job) -> None:
    plan = job.model.tables.plan
    itemsize = getattr(torch, config.model.table_dtype).itemsize
    held = report.holdings(plan, itemsize, config.optimizer.tables.build())
    folder.write("config.yaml", resolved_yaml(config))
    plan.save(folder.path / "plan.json")
    report.show_start(console, config, data, plan, held)


def _summary(result: Evaluation, data: Interactions, trained: Trained, folder: RunFolder | None) -> dict[str, Any]:
    return {
        **result.to_json(),
        "losses": trained.losses[:LOSSES_KEPT],
        "samples_per_second": trained.samples_per_second,
        "run_dir": str(folder.path) if folder is not None else None,
        "ranks": se.world_size(),
        "steps": len(trained.losses),
        "dropped_rows": data.dropped.kinds,
    }
