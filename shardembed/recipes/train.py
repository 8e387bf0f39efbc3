"""The training job, from a configuration to a summary: join, scan, build, resume, train, evaluate.

Every rank runs this with the same configuration. Each reads the whole stream of rows and takes its part of every
global batch, so all ranks see the same number of steps and need not ask each other whether data are left. Rank 0 alone prints
and writes, but for checkpoints.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import shardembed as se
from shardembed.comm import Comm, default_device
from shardembed.recipes import report, runs
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.common import JobConfig
from shardembed.recipes.rates import Rates
from shardembed.recipes.resolved import resolved_yaml
from shardembed.recipes.run_folder import VOCABULARIES, RunFolder
from shardembed.recipes.runs import Run
from shardembed.recipes.saving import Progress, resume, save
from shardembed.recipes.scalars import Scalars
from shardembed.recipes.tasks import Evaluated, Task, prepare
from shardembed.recipes.watch import Watch

REPORT_STEPS = 20  # losses are summed over the ranks this many at a time


def run(config: JobConfig, console: Console, fresh: bool = False) -> dict[str, Any]:
    """Train and evaluate, from where an interrupted run with these settings was last saved. Collective over the job that `se.init`
    joins.

    Args:
        console: where rank 0 reports; other ranks print nothing.
        fresh: begin a new run whatever there is.

    Returns:
        The summary, the same on every rank except for `run_dir`, which only rank 0 knows.
    """
    comm = se.init()
    task = prepare(config, comm)
    _agree(comm, config, task.counted())
    told = console if comm.rank == 0 else Console(quiet=True)
    report.show_warnings(told, task.warnings())
    job = task.build()
    with runs.opened(comm, config, task.counted(), fresh) as opened:
        _start(told, opened, task, job)
        rates = Rates(job.optimizer, config.train.schedule, task.steps)  # before rates are loaded
        progress = resume(told, opened, job, task.steps) if opened.resumes else Progress()
        if opened.folder is not None and opened.resumes:
            opened.folder.keep_metrics(progress.step)
        trained = train(job, task, told, opened, progress, rates)
        told.print(f"evaluating on {task.evaluates()}", highlight=False)
        began = time.monotonic()
        result = evaluate(task, job)
        summary = _summary(result, task, trained, opened.folder)
        if opened.folder is not None:
            opened.folder.log([{key: value for key, value in summary.items() if key != "losses"}])
            opened.folder.finish(summary)
            took = {"training": trained.seconds, "evaluation": time.monotonic() - began}
            result.show(console)
            report.show_end(console, took, trained.samples_per_second, opened.path, _page(config, opened.path))
    return summary


def _page(config: JobConfig, path: Path) -> str:
    """Make the run's page; says where it is, or why there is none. The run is finished, with or without."""
    if not config.log.page:
        return "none, since log.page is false"
    from shardembed.recipes import recorded, run_page  # with them the planner's libraries, which take a second to import

    try:
        return str(run_page.write(recorded.read(path)))
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"


def evaluate(task: Task, job: TrainingJob) -> Evaluated:
    """Collective."""
    return task.evaluate(job)


def train(job: TrainingJob, task: Task, console: Console, run: Run, begun: Progress, rates: Rates) -> Progress:
    """The loop, from where it was left. Collective; where the run has a folder, writes each step's loss to it.

    A checkpoint comes after every so many steps and after the last, once all that it stands for has been written.
    """
    config = task.config
    every, looks = config.checkpoint.every_steps, config.eval.every_steps
    steps = begun.step if begun.stopped else task.steps
    progress = begun
    waiting: list[torch.Tensor] = []
    records: list[dict[str, Any]] = []
    began = time.monotonic()
    with ExitStack() as around:
        shown = around.enter_context(report.ProgressReport(console, steps))
        watch = around.enter_context(Watch(task, job, run.folder, begun.step, shown.note))
        scalars = around.enter_context(Scalars(run.path if run.folder is not None and config.log.tensorboard else None, begun.step))
        parts = around.enter_context(closing(task.parts(range(begun.step, steps))))
        for step, part in zip(range(begun.step, steps), job.given(parts), strict=True):
            epoch = step // task.steps_per_epoch
            rates.set(step)
            with watch.step(step):
                waiting.append(job.step(part, step))
            records.append({"step": step + 1, "epoch": epoch + 1})
            progress = replace(progress, step=step + 1, epoch=epoch + 1, samples=progress.samples + part.global_size)
            saves = every is not None and ((step + 1) % every == 0 or step + 1 == steps)
            evaluates = looks is not None and (step + 1) % looks == 0
            if (step + 1) % REPORT_STEPS and step + 1 < steps and not saves and not evaluates:
                continue
            found = _global_losses(waiting)
            waiting.clear()
            progress = replace(progress.with_losses(found), seconds=begun.seconds + time.monotonic() - began)
            shown.update(step + 1, found[-1], progress.samples_per_second)
            lines = [{**record, "loss": loss} for record, loss in zip(records, found, strict=True)]
            records.clear()
            if evaluates:
                result = evaluate(task, job)
                progress = progress.with_score(result.score, config.eval)
                lines.append({"step": step + 1, "evaluation": result.to_json()})
                shown.note(f"step {step + 1}: {_in_words(result)}")
                saves = saves or (every is not None and progress.stopped)
            if run.folder is not None:
                run.folder.log(lines, lasting=saves)
            scalars.add(lines, job.optimizer, progress.samples_per_second)
            watch.look(step + 1)
            if saves:
                save(console, run, job, progress, config.checkpoint.keep)
            if progress.stopped:
                best = f"{progress.best:.4f}"
                shown.note(f"step {step + 1}: no evaluation was better than {best} for {progress.waited} in a row; training ends")
                break
    return replace(progress, seconds=begun.seconds + time.monotonic() - began)


def _in_words(result: Evaluated) -> str:
    parts = [f"{name} {value:.4f}" for name, value in result.to_json().items() if isinstance(value, float)]
    return ", ".join(parts[:2])


def _global_losses(losses: list[torch.Tensor]) -> list[float]:
    """The means over the ranks of several steps' losses, in one all-reduce."""
    comm = Comm.of()
    total = comm.all_reduce("mean losses", torch.stack(losses).to(torch.float64))
    return (total / comm.world_size).tolist()


def _agree(comm: Comm, config: JobConfig, counted: str) -> None:
    """Ranks on several machines might have read different files; training would go wrong slowly rather than fail."""
    device = default_device()
    comm.agree("the configuration", resolved_yaml(config).split("\n"), device)
    comm.agree("the data", [counted], device)


def _start(console: Console, run: Run, task: Task, job: TrainingJob) -> None:
    if run.folder is None:
        return
    config, plan = task.config, job.model.tables.plan
    held = report.holdings(plan, config)
    run.folder.write("config.yaml", resolved_yaml(config))
    plan.save(run.path / "plan.json")
    task.save_vocabularies(run.path / VOCABULARIES)
    report.show_start(console, config, task.described(), plan, held)
    for note in run.notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def _summary(result: Evaluated, task: Task, trained: Progress, folder: RunFolder | None) -> dict[str, Any]:
    return {
        **result.to_json(),
        "losses": list(trained.losses),
        "samples_per_second": trained.samples_per_second,
        "run_dir": str(folder.path) if folder is not None else None,
        "ranks": se.world_size(),
        "steps": trained.step,
        "stopped_early": trained.stopped,
        "dropped_rows": task.dropped.kinds,
    }
