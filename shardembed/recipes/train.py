"""The training job, from a configuration to a summary: join, scan, build, resume, train, evaluate.

Every rank runs this with the same configuration. Each reads the whole stream of rows and takes its part of every
global batch, so all ranks see the same number of steps and need not ask each other whether data are left. Rank 0 alone prints
and writes, but for checkpoints.
"""

from __future__ import annotations

import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.config import cores
from shardembed.errors import ShardEmbedError
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
from shardembed.recipes.step_log import StepLog
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
    steps = begun.step if begun.stopped else task.steps
    with ExitStack() as around:
        shown = around.enter_context(report.ProgressReport(console, steps))
        watch = around.enter_context(Watch(task, job, run.folder, begun.step))
        parts = around.enter_context(closing(task.parts(range(begun.step, steps))))
        skipped = nonfinite.Skipped(job, shown)
        loop = _Loop(job, task, console, run, begun, counts, tracking, shown, watch)
        around.enter_context(loop.log.stopping(lambda: loop.progress, steps))
        for step, part in zip(range(begun.step, steps), job.given(parts), strict=True):
            rates.set(step)
            with watch.step(step):
                loss = job.step(part, step)
            loop.took(step, part.global_size, loss, skipped.last_was(step + 1))
            # Losses stay on their device until then: reading one a step would wait for the GPU each time.
            if (step + 1) % REPORT_STEPS == 0 or step + 1 == steps or loop.saves_after(step + 1) or task.evaluates_after(step + 1):
                loop.look()
            if loop.progress.stopped:
                break
    return replace(loop.progress, seconds=loop.seconds), loop.result


class _Loop:
    """Where the loop is, and what comes between two of its steps. All ranks come to it after the same steps, since what is due
    follows from their number and from scores that all have: `look` is collective.

    Attributes:
        progress: how far it is.
        result: what the weights of the last step reach, where they were evaluated.
        log: of the steps since the last look.
    """

    def __init__(
        self,
        job: TrainingJob,
        task: Task,
        console: Console,
        run: Run,
        begun: Progress,
        counts: IdCounts,
        tracking: Tracking,
        shown: report.ProgressReport,
        watch: Watch,
    ) -> None:
        self.progress, self.log = begun, StepLog(run)
        self.result: Evaluated | None = None
        self._job, self._task, self._console, self._run = job, task, console, run
        self._counts, self._tracking, self._shown, self._watch = counts, tracking, shown, watch
        self._began = time.monotonic() - begun.seconds  # as if all training had been now

    @property
    def seconds(self) -> float:
        """Of training, restarts included and evaluations not."""
        return time.monotonic() - self._began

    def took(self, step: int, samples: int, loss: torch.Tensor, skipped: bool) -> None:
        """Step `step` (from 0), on so many samples of all ranks, with this rank's loss."""
        epoch = step // self._task.steps_per_epoch + 1
        self.log.add(step + 1, epoch, loss, skipped)
        self.progress = replace(self.progress, step=step + 1, epoch=epoch, samples=self.progress.samples + samples)
        self.result = None

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint comes after so many steps, whatever evaluations say."""
        every = self._task.config.checkpoint.every_steps
        return every is not None and (step % every == 0 or step == self._task.steps)

    def look(self) -> None:
        """Evaluate, write and save what is due after the last step, and tell of the steps since the last look. Collective.

        Raises:
            NonFiniteError: on all ranks: the weights hold inf or nan.
        """
        step, lines = self.progress.step, self.log.gathered()
        losses = [line["loss"] for line in lines]
        self.progress = replace(self.progress.with_losses(losses), seconds=self.seconds)
        self._shown.update(step, losses[-1], self.progress.samples_per_second)
        best_before = (self.progress.kept, self.progress.kept_step, self.progress.kept_by)
        improved = self._task.evaluates_after(step) and self._evaluate(lines)
        ends = self.progress.stopped and self._task.config.checkpoint.every_steps is not None
        saves = self.saves_after(step) or improved or ends
        lines += self._counts.lines(step)
        if self._run.folder is not None:
            # On the disk before the checkpoint that stands for these steps: a resumed run must find them.
            self._run.folder.log(lines, lasting=saves)
        self._tracking.add(lines, self._job.optimizer, self.progress.samples_per_second)
        self._watch.look(step)
        if saves and not self._save(improved):
            kept, kept_step, kept_by = best_before
            self.progress = replace(self.progress, kept=kept, kept_step=kept_step, kept_by=kept_by)
        if step == self._task.steps or self.progress.stopped:
            nonfinite.check(self._job)  # what the last step made has not been read by another
        if self.progress.stopped:
            waited = f"no evaluation was better than {self.progress.best:.4f} for {self.progress.waited} in a row"
            self._shown.note(f"step {step}: {waited}; training ends")

    def _evaluate(self, lines: list[dict[str, Any]]) -> bool:
        """Note in `lines` what the weights reach; returns whether they are the best so far, to be kept. Collective."""
        looked, task, config, before = time.monotonic(), self._task, self._task.config, self.progress
        self.result = task.validate(self._job) if task.validates else evaluate(task, self._job)
        self._began += time.monotonic() - looked  # which is no training
        found = self.result.to_json()
        lines.append({"step": before.step, "evaluation": found})
        scored = before.with_score(self.result.score, config.eval)
        self.progress = best.scored(scored, self.result.score, config) if best.wanted(config) else scored
        improved = self.progress is not scored
        self._shown.note(f"step {before.step}: {report.in_words(found)}{', the best so far' * improved}")
        return improved

    def _save(self, improved: bool) -> bool:
        """Save a checkpoint, and keep it where it is the best; returns whether there is one of what `progress` says. Collective."""
        saved = save(self._console, self._run, self._job, self.progress, self._task.config.checkpoint.keep)
        if improved and saved is not None:
            best.keep(self._console, self._run, saved)
        return saved is not None or not improved


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
