"""The training job, from a configuration to a summary: join, scan, build, resume, train, evaluate.

Every rank runs this with the same configuration. Each reads the whole stream of rows and takes its part of every
global batch, so all ranks see the same number of steps and need not ask each other whether data are left. Rank 0 alone prints
and writes, but for checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.config import cores
from shardembed.errors import NonFiniteError, ShardEmbedError
from shardembed.recipes import best, nonfinite, report, runs
from shardembed.recipes import since as since_run
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.common import JobConfig
from shardembed.recipes.data.naming import bring_names, keep_names
from shardembed.recipes.former import Former, check_rows, find
from shardembed.recipes.id_counts import IdCounts
from shardembed.recipes.rates import Rates
from shardembed.recipes.resolved import resolved_yaml
from shardembed.recipes.run_folder import CONFIG, NAMES, PLAN, SETTINGS, VOCABULARIES, RunFolder
from shardembed.recipes.runs import Run
from shardembed.recipes.saving import Progress, resume, save
from shardembed.recipes.since import Since
from shardembed.recipes.task import Evaluated, Task
from shardembed.recipes.tasks import prepare
from shardembed.recipes.together import on_all
from shardembed.recipes.tracking import Tracking, flat
from shardembed.recipes.watch import Watch

REPORT_STEPS = 20  # losses are summed over the ranks this many at a time


@dataclass(frozen=True)
class Done:
    """A run that has ended.

    Attributes:
        summary: the same on every rank except for `run_dir`, which only rank 0 knows.
        metrics: of the evaluation at the end.
        path: of the run's folder.
        job: the model and what has trained it.
    """

    summary: dict[str, Any]
    metrics: dict[str, Any]
    path: Path
    job: TrainingJob


def run(config: JobConfig, console: Console, fresh: bool = False, from_run: str | Path | None = None) -> dict[str, Any]:
    """As `work`: the summary alone."""
    return work(config, console, fresh, from_run).summary


def work(config: JobConfig, console: Console, fresh: bool = False, from_run: str | Path | None = None) -> Done:
    """Train and evaluate, from where an interrupted run with these settings was last saved. Collective over the job that `se.init`
    joins.

    Args:
        console: where rank 0 reports; other ranks print nothing.
        fresh: begin a new run whatever there is.
        from_run: the folder of a run, or of one of its checkpoints, whose model this one begins with.
    """
    comm = se.init()
    former = None if from_run is None else on_all(comm, "find the run to begin from", lambda: find(from_run, config))
    task = prepare(config, comm)
    counted = task.counted()
    _agree(comm, config, counted, str(former or ""))
    if former is not None:
        scanned = task
        task = on_all(comm, "go on from its tables", lambda: scanned.following(former))
        check_rows(former, config, task.tables())
    told = console if comm.rank == 0 else Console(quiet=True)
    report.show_warnings(told, task.warnings())
    job = task.build()
    with runs.opened(comm, config, counted, fresh, str(former or "")) as opened:
        _start(told, opened, task, job)
        if not opened.resumes:
            _keep_names(told, config, opened.path / NAMES, former)
            if opened.folder is not None:
                opened.folder.log([{SETTINGS: flat(config)}])
        rates = Rates(job.optimizer, config.train.schedule, task.steps)  # before rates are loaded
        progress = resume(told, opened, job, task.steps) if opened.resumes else Progress()
        progress = best.settle(told, opened, progress, config) if opened.resumes else progress
        since = None if former is None else _since(told, former, opened, task, job)
        if opened.folder is not None and opened.resumes:
            opened.folder.keep_metrics(progress.step)
        counts = IdCounts(job.model.tables, progress.step)
        with Tracking(opened, config, progress.step, partial(told.print, highlight=False, markup=False)) as tracking:
            trained, result = train(job, task, told, opened, progress, rates, counts, tracking)
            began, unknown, skipped = time.monotonic(), counts.lines(trained.step), job.optimizer.skipped
            result, step = _ended(told, opened, task, job, trained, result)
            tracking.finish(step, {**result.to_json(), "samples_per_second": trained.samples_per_second})
        summary = {**_summary(result, task, trained, skipped, opened.folder), "best_step": step}
        if since is not None:
            since = since_run.ended(since, job.model.tables)
            since.write(opened, result.to_json())
            summary |= {"before": since.before, "since": since.to_json()}
        if opened.folder is not None:
            opened.folder.log([*unknown, {key: value for key, value in summary.items() if key != "losses"}])
            took = {"training": trained.seconds, "evaluation": time.monotonic() - began}
            result.show(console)
            if since is not None:
                since_run.show(console, since, result)
            report.show_skipped(console, skipped, trained.step)
            opened.folder.finish(summary)
            report.show_end(console, took, trained.samples_per_second, opened.path, _page(config, opened.path))
    return Done(summary, result.to_json(), opened.path, job)


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


def _ended(
    console: Console, run: Run, task: Task, job: TrainingJob, trained: Progress, last: Evaluated | None
) -> tuple[Evaluated, int]:
    """The job with the weights that it is to end with: what they reach, and the step that they are of. Collective.

    last: what the weights of the last step reach, where these have been evaluated.
    """
    step = trained.step
    if best.wanted(task.config):
        step = best.load(console, run, job, step)
    else:
        best.drop(run)
    if last is not None and step == trained.step and not task.validates:
        return last, step
    told = f"evaluating on {task.evaluates()}"
    if step != trained.step:
        told += f" with the best weights, those of step {step:,} of {trained.step:,}"
        told += "" if task.validates else " (chosen by the same ones, which flatters a little)"
    console.print(told, highlight=False)
    return evaluate(task, job), step


def train(
    job: TrainingJob,
    task: Task,
    console: Console,
    run: Run,
    begun: Progress,
    rates: Rates,
    counts: IdCounts,
    tracking: Tracking,
) -> tuple[Progress, Evaluated | None]:
    """The loop, from where it was left. Collective; where the run has a folder, writes each step's loss to it. Beside how far it
    came it gives what the last weights reach, where they were evaluated.

    A checkpoint comes after every so many steps, after an evaluation that is the best so far, and after the last step, once all
    that it stands for has been written.
    """
    config, log = task.config, _Log(run)
    every, keeps = config.checkpoint.every_steps, best.wanted(config)
    result: Evaluated | None = None
    steps = begun.step if begun.stopped else task.steps
    progress = begun
    began = time.monotonic()
    with ExitStack() as around:
        shown = around.enter_context(report.ProgressReport(console, steps))
        watch = around.enter_context(Watch(task, job, run.folder, begun.step))
        parts = around.enter_context(closing(task.parts(range(begun.step, steps))))
        skipped = nonfinite.Skipped(job, shown)
        around.enter_context(log.stopping(lambda: progress, steps))
        for step, part in zip(range(begun.step, steps), job.given(parts), strict=True):
            epoch = step // task.steps_per_epoch
            rates.set(step)
            with watch.step(step):
                loss = job.step(part, step)
            log.add(step + 1, epoch + 1, loss, skipped.last_was(step + 1))
            progress = replace(progress, step=step + 1, epoch=epoch + 1, samples=progress.samples + part.global_size)
            saves = every is not None and ((step + 1) % every == 0 or step + 1 == steps)
            evaluates, result, before = task.evaluates_after(step + 1), None, progress
            improved = False
            # Losses stay on their device until then: reading one a step would wait for the GPU each time.
            if (step + 1) % REPORT_STEPS and step + 1 < steps and not saves and not evaluates:
                continue
            lines = log.gathered()
            found = [line["loss"] for line in lines]
            progress = replace(progress.with_losses(found), seconds=begun.seconds + time.monotonic() - began)
            shown.update(step + 1, found[-1], progress.samples_per_second)
            if evaluates:
                looked = time.monotonic()
                result = task.validate(job) if task.validates else evaluate(task, job)
                began += time.monotonic() - looked  # which is no training
                progress = progress.with_score(result.score, config.eval)
                lines.append({"step": step + 1, "evaluation": result.to_json()})
                before = progress
                progress = best.scored(progress, result.score, config) if keeps else progress
                improved = progress is not before
                shown.note(f"step {step + 1}: {report.in_words(result.to_json())}{', the best so far' * improved}")
                saves = saves or improved or (every is not None and progress.stopped)
            lines += counts.lines(step + 1)
            if run.folder is not None:
                # On the disk before the checkpoint that stands for these steps: a resumed run must find them.
                run.folder.log(lines, lasting=saves)
            tracking.add(lines, job.optimizer, progress.samples_per_second)
            watch.look(step + 1)
            if saves:
                saved = save(console, run, job, progress, config.checkpoint.keep)
                if improved and saved is not None:
                    best.keep(console, run, saved)
                elif improved:
                    progress = before
            if step + 1 == steps or progress.stopped:
                nonfinite.check(job)  # what the last step made has not been read by another
            if progress.stopped:
                highest = f"{progress.best:.4f}"
                shown.note(
                    f"step {step + 1}: no evaluation was better than {highest} for {progress.waited} in a row; training ends"
                )
                break
    return replace(progress, seconds=begun.seconds + time.monotonic() - began), result


class _Log:
    """Lines of metrics.jsonl for steps whose losses have not been gathered from the ranks yet."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._losses: list[torch.Tensor] = []
        self._lines: list[tuple[int, int, bool]] = []

    def add(self, step: int, epoch: int, loss: torch.Tensor, skipped: bool) -> None:
        self._losses.append(loss)
        self._lines.append((step, epoch, skipped))

    def gathered(self) -> list[dict[str, Any]]:
        """The lines since the last call, with the means over the ranks of the losses, in one all-reduce. Collective."""
        if not self._lines:
            return []
        comm = Comm.of()
        total = comm.all_reduce("mean losses", torch.stack(self._losses).to(torch.float64))
        means = (total / comm.world_size).tolist()
        lines = [nonfinite.line(*line, loss) for line, loss in zip(self._lines, means, strict=True)]
        self._lines, self._losses = [], []
        return lines

    @contextmanager
    def stopping(self, progress: Callable[[], Progress], steps: int) -> Iterator[None]:
        """Around the loop: one that ends for inf or nan leaves the reason as its last line. Collective then."""
        try:
            yield
        except NonFiniteError as error:
            last = progress()
            why = nonfinite.why(error, last.step, steps)
            lines = self.gathered()
            if self._run.folder is not None:
                self._run.folder.log([*lines, nonfinite.last_line(error, last.step, last.epoch, why)], lasting=True)
            raise NonFiniteError(f"{why}; {nonfinite.advice(error)}") from error


def _since(console: Console, former: Former, run: Run, task: Task, job: TrainingJob) -> Since:
    """What is known of the run that this one begins from, or began from when it was interrupted. Collective."""
    if run.resumes:
        return since_run.noted(former, run)
    found = since_run.begin(console, former, run, task, job)
    # Not beside evaluations of other rows.
    if run.folder is not None and found.before is not None and not task.validates:
        run.folder.log([{"step": 0, "evaluation": found.before}])
    return found


def _agree(comm: Comm, config: JobConfig, counted: str, former: str) -> None:
    """Ranks on several machines might have read different files; training would go wrong slowly rather than fail."""
    comm.agree("the configuration", resolved_yaml(config).split("\n"))
    comm.agree("the data", [counted])
    comm.agree("the run to begin from", [former])


def _start(console: Console, run: Run, task: Task, job: TrainingJob) -> None:
    if run.folder is None:
        return
    config, plan = task.config, job.model.tables.plan
    tables = job.model.tables.tables
    held = report.holdings(plan, tables, config, task.ids())
    folder = run.folder
    report.show_start(console, config, task.described(), plan, held, tables)
    console.print(cores.said(torch.get_num_threads()), highlight=False, markup=False)
    folder.note = partial(console.print, soft_wrap=True, highlight=False, markup=False)
    folder.attempt(CONFIG, lambda: folder.write(CONFIG, resolved_yaml(config)))
    folder.attempt(PLAN, lambda: folder.write(PLAN, plan.to_text()))
    folder.attempt(VOCABULARIES, lambda: task.save_vocabularies(run.path / VOCABULARIES))
    for note in run.notes:
        console.print(note, soft_wrap=True, highlight=False, markup=False)


def _keep_names(console: Console, config: JobConfig, folder: Path, former: Former | None) -> None:
    """Of ids that are texts. A job without them trains on; what it reports lacks names."""
    try:
        if former is not None and se.rank() == 0:
            bring_names(folder, former.run / NAMES)
        keep_names(config.data, folder, se.rank(), se.world_size())
    except ShardEmbedError as error:
        console.print(f"names of ids are not kept: {error}", soft_wrap=True, highlight=False, markup=False)


def _summary(result: Evaluated, task: Task, trained: Progress, skipped: int, folder: RunFolder | None) -> dict[str, Any]:
    return {
        **result.to_json(),
        "losses": list(trained.losses),
        "samples_per_second": trained.samples_per_second,
        "run_dir": str(folder.path) if folder is not None else None,
        "ranks": se.world_size(),
        "steps": trained.step,
        "stopped_early": trained.stopped,
        "skipped_steps": skipped,
        "dropped_rows": task.dropped.kinds,
    }
