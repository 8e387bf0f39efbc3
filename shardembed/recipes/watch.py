"""What a run says of itself beside its metrics, for its page: `observed.json` in its folder.

    starts   of the job, the newest ones: when, at which step, on what
    look     the newest one. There is one before every checkpoint and at the end, of the few steps before it: stages and ranks
             (`se.profile`), memory (`se.memory`), and samples of the ids (`id_sample`)

A look takes collectives, so all ranks look at the same steps; rank 0 writes.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

import shardembed as se
from shardembed.comm.comm import Comm
from shardembed.comm.job import default_device, ranks_per_node
from shardembed.config import cores
from shardembed.doctor.packages import installed
from shardembed.observe import Profile
from shardembed.recipes import observed, report
from shardembed.recipes.build import TrainingJob
from shardembed.recipes.id_sample import IdSample
from shardembed.recipes.run_folder import OBSERVED, RunFolder
from shardembed.recipes.task import Task

STEPS = 8  # that a look goes back, at most
SETTLED = (
    3  # steps that no look is wanted of: a process's first, which compile and allocate, and those after a save, which wait for it
)
STARTS = 50


class Watch:
    """Watches the steps of one start of a run; use it as a context."""

    def __init__(self, task: Task, job: TrainingJob, folder: RunFolder | None, begun: int) -> None:
        config = task.config
        self._job, self._folder, self._begun = job, folder, begun
        self._samples = max(1, config.train.global_batch_size // se.world_size())
        self._evaluates, self._saves, self._last = task.evaluates_every, config.checkpoint.every_steps, task.steps
        self._wanted = config.log.page
        self._sample = IdSample(job.model.tables, job.model.tables.features) if self._wanted and folder is not None else None
        self._profile: Profile | None = None
        self._complete: Profile | None = None
        self._open = ExitStack()
        self._loading = _Between()
        self._found: dict[str, Any] = {}
        if folder is not None:
            self._found = read(folder.path)
            self._found["starts"] = [*self._found["starts"], _start(begun, job, task)][-STARTS:]
            self._write()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._sample is not None:
            self._sample.close()
        # A profile that hears of an error tells nobody: the other ranks may be elsewhere.
        self._open.__exit__(kind, error, trace)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step `step` (from 0). Collective in the last step before a look."""
        end = self._end(step)
        if self._wanted and self._profile is None and self._is_near(step, end):
            self._profile = self._open.enter_context(se.profile(self._job.model))
            self._loading = _Between()
        self._loading.ends()
        with ExitStack() as around:
            if self._sample is not None:
                around.enter_context(self._sample.watching())
            yield
        self._loading.begins()
        if step + 1 == end:
            self._open.close()
            self._complete, self._profile = self._profile, None

    def look(self, step: int) -> None:
        """After step number `step` (from 1), before its checkpoint. Collective."""
        profile, self._complete = self._complete, None
        if profile is None:
            return
        memory = se.memory(self._job.model, self._samples).as_dict()
        if self._folder is None or self._sample is None:
            return
        self._found["look"] = {
            "step": step,
            "profile": {**profile.as_dict(), "loading": self._loading.mean},
            "memory": {name: memory[name] for name in ("samples", "categories", "tables")},
            "ids": self._sample.found(),
        }
        self._write()

    def _end(self, step: int) -> int:
        """The next number of steps after which there is a look, or an evaluation, which a look must not reach over."""
        every = [self._saves, self._evaluates]
        return min([self._last, *((step // each + 1) * each for each in every if each is not None)])

    def _is_near(self, step: int, end: int) -> bool:
        saves = self._saves is not None and end % self._saves == 0
        saved = step // self._saves * self._saves if self._saves is not None else 0
        settled = max(self._begun, saved) + SETTLED
        # One step is better than none; but the last few steps of a job are no reason to forget a better look.
        forced = end - step == 1 and (saves or saved <= self._begun)
        return (saves or end == self._last) and end - step <= STEPS and (step >= settled or forced)

    def _write(self) -> None:
        assert self._folder is not None
        folder = self._folder
        folder.attempt(OBSERVED, lambda: folder.write(OBSERVED, json.dumps(self._found)))


class _Between:
    """The mean time between steps, in which data are read and logs are written."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds, self._count = 0.0, 0

    def begins(self) -> None:
        self._since = time.perf_counter()

    def ends(self) -> None:
        if self._since is not None:
            self._seconds += time.perf_counter() - self._since
            self._count += 1

    @property
    def mean(self) -> float | None:
        return self._seconds / self._count if self._count else None


def read(folder: Path) -> dict[str, Any]:
    """What `Watch` has written there; without starts and looks where there is nothing that can be read."""
    try:
        return observed.observed(folder / OBSERVED)
    except (OSError, ValueError):
        return {"format": observed.FORMAT, "starts": [], "look": None}


def _start(step: int, job: TrainingJob, task: Task) -> dict[str, Any]:
    comm, device, config, tables = Comm.of(), default_device(), task.config, job.model.tables
    held = report.holdings(tables.plan, tables.tables, config, task.ids())
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "steps": task.steps,
        "model": report.MODEL_NAMES.get(config.model.kind, config.model.kind),
        "batch": config.train.global_batch_size,
        "ranks": comm.world_size,
        "ranks_per_node": ranks_per_node(comm.world_size),
        "host": platform.node(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": cores.usable(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "kernels": sorted({slab.kernel.name for slab in tables.journey.slabs}),
        "versions": {"shardembed": se.__version__, "python": sys.version.split()[0], **installed()},
        "data": task.described(),
        "reserved": task.reserved(),
        "features": {feature.key: tables.tables[feature.table].name for feature in tables.features},
        "rows": report.sizes(tables.tables),
        "held": [{"rows": sum(one.rows.values()), "weights": one.weights, "state": one.state} for one in held],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
