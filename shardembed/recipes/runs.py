"""Which folder a job works in: that of the newest run which was interrupted and has the same settings, or a new one.

Rank 0 looks and decides, and tells the others.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shardembed.checkpoint import newest_checkpoint
from shardembed.comm.comm import Comm
from shardembed.config import plain_json
from shardembed.embeddings.of_run import CHECKPOINTS
from shardembed.errors import ConfigError, DataError, ShardEmbedError, rebuild, travels
from shardembed.recipes import config as settings
from shardembed.recipes.common import JobConfig
from shardembed.recipes.run_folder import CONFIG, DATA, LOCK, RunFolder, is_finished

# What a run may change and still compute the same, up to the order of sums.
FREE = ("name", "plan", "checkpoint", "eval", "log", "run_dir")
MOST_RUNS = 1 << 53  # a number beyond counted no runs

# What data are known by ends with their fingerprint, and ended otherwise before there was one.
ORDER = re.compile(r", in the order [0-9a-f]{16}")
OF_OLD_RUNS = re.compile(r", held-out rows \d+, counts [0-9a-f]{8}|, checksum [0-9a-f]{16}")


@dataclass(frozen=True)
class Run:
    """Where a job works.

    Attributes:
        path: the run's folder, the same on every rank.
        folder: what writes to it; rank 0 alone has it.
        resumes: it has a checkpoint to go on from.
        notes: what to tell the user of how the folder was chosen.
    """

    path: Path
    folder: RunFolder | None
    resumes: bool
    notes: tuple[str, ...] = ()

    @property
    def checkpoints(self) -> Path:
        return self.path.absolute() / CHECKPOINTS  # ranks may work in different folders


@contextmanager
def opened(comm: Comm, config: JobConfig, counted: str, fresh: bool, former: str = "") -> Iterator[Run]:
    """The run that this job goes on with, or begins; locked until the context ends. Collective.

    Args:
        counted: what the data are known by. A run on other data is not resumed.
        fresh: resume nothing that is older than this job.
        former: what the run that this job begins from is known by. One that began from another is not resumed.

    Raises:
        ConfigError, DataError: on every rank: there can be no folder, not all ranks see it, or the data have changed.
    """
    run: Run | None = None
    said: dict[str, Any] = {}
    if comm.rank == 0:
        try:
            run = _chosen(config, counted, fresh, former)
            assert run.folder is not None
            said = {"path": str(run.path.absolute()), "resumes": run.resumes, "token": run.folder.token}
        except ShardEmbedError as error:
            said = {"error": travels(error)}
            # The other ranks are waiting in `_share` to hear of it.
            _share(comm, said)
            raise
    try:
        said = _share(comm, said)
        if "error" in said:
            raise rebuild(*said["error"])
        if config.checkpoint.every_steps is not None:
            _check_seen(comm, Path(said["path"]), said["token"])
        yield run or Run(Path(said["path"]), None, said["resumes"])
    except KeyboardInterrupt as error:
        if run is not None and (saved := _saved(run.path)):
            error.args = (saved,)  # for whoever tells of the end
        raise
    finally:
        if run is not None and run.folder is not None:
            run.folder.close()


def saved_by(config: JobConfig, job: str) -> str:
    """What the ranks that were started as `job` have left to go on from, in words; empty where that is nothing."""
    if config.checkpoint.every_steps is None:
        return ""
    found = (path for path in _interrupted(Path(config.run_dir), config.name or "run") if _job_of(path) == job)
    return next(map(_saved, found), "")


def _saved(path: Path) -> str:
    newest = None
    with suppress(ShardEmbedError):
        newest = newest_checkpoint(path / CHECKPOINTS)
    if newest is None or is_finished(path):
        return ""
    return f"stopped; {path} holds {newest.name}: give the same command again to go on from there"


def _share(comm: Comm, said: dict[str, Any]) -> dict[str, Any]:
    return json.loads(comm.gather_texts("control", "choose the run folder", json.dumps(said))[0])


def _check_seen(comm: Comm, path: Path, token: str) -> None:
    try:
        seen = (path / LOCK).read_text() == token
    except OSError:
        seen = False
    answers = comm.gather_texts("control", "see the run folder", "seen" * seen)
    blind = [rank for rank, answer in enumerate(answers) if not answer]
    if blind:
        raise ConfigError(
            f"run_dir: rank(s) {', '.join(map(str, blind))} do not see {path}, which rank 0 works in: all ranks need one file "
            "system. Set run_dir to a folder on it, or checkpoint.every_steps to null"
        )


def _chosen(config: JobConfig, counted: str, fresh: bool, former: str) -> Run:
    root, name = Path(config.run_dir), config.name or "run"
    job = _job()
    token = json.dumps({"job": job, "start": secrets.token_hex(8)})
    notes: list[str] = []
    for path in _interrupted(root, name) if config.checkpoint.every_steps is not None else ():
        if fresh and _job_of(path) != job:
            continue
        obstacle = _obstacle(path, config) or _other_former(path, former)
        if obstacle:
            notes.append(f"{path} is unfinished, but {obstacle}: starting a new run")
            continue
        folder = RunFolder.lock(path, token)
        if folder is None:
            notes.append(f"{path} is unfinished, but another process is working on it: starting a new run")
            continue
        if is_finished(path):  # by whoever had the lock until now
            folder.close()
            continue
        try:
            note = _check_data(path, counted)
        except DataError:
            folder.close()
            raise
        if note:
            about = json.dumps({"counted": counted, "from": former})  # such a version gave no number
            folder.attempt(DATA, partial(folder.write, DATA, about))
        return Run(path, folder, resumes=True, notes=(note,) * bool(note))
    folder = RunFolder.make(root, name, token)
    # Not the time: clocks are set back, and differ between machines.
    number = 1 + max((run.number for run in _runs(root, name)), default=0)
    try:
        folder.write(DATA, json.dumps({"counted": counted, "number": number, "from": former}))
    except OSError as error:
        folder.close()
        raise ConfigError(
            f"run_dir: cannot write {folder.path / DATA}: {error.strerror or error}; set run_dir to another folder"
        ) from error
    return Run(folder.path, folder, resumes=False, notes=tuple(notes[:1]))


def _job() -> str:
    """The same for all the times that a launcher starts this job's ranks, and for nothing else."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return job_of_launch(run, os.getppid()) if run else secrets.token_hex(8)


def job_of_launch(run_id: str, launcher: int) -> str:
    """What the ranks of a launch are known by. torchrun calls all runs "none" unless told otherwise; they differ in its process."""
    return f"{run_id}-{launcher}"


def _job_of(path: Path) -> str | None:
    try:
        return plain_json.read(path / LOCK)["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, order=True)
class _Begun:
    """A run, in the order in which they were begun: by the number that each has after those before it. Older versions gave none
    (0); these go by their names, with the local time.
    """

    number: int
    time: str
    same_time: int
    path: Path


def _runs(root: Path, name: str) -> list[_Begun]:
    """All runs of that name, in no order."""
    pattern = re.compile(rf"{re.escape(name)}-(\d{{8}}-\d{{6}})(?:-(\d+))?")
    try:
        found = [(match, root / one) for one in os.listdir(root) if (match := pattern.fullmatch(one))]
    except OSError:  # making a new one tells what is wrong
        return []
    return [_Begun(_number_of(path), match[1], int(match[2] or 1), path) for match, path in found]


def _number_of(path: Path) -> int:
    """What the folder's data.json says, which need not be ours: a pipe never answers, and the next number must fit its file."""
    try:
        number = plain_json.read(path / DATA)["number"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return number if type(number) is int and 0 < number <= MOST_RUNS else 0


def _interrupted(root: Path, name: str) -> list[Path]:
    """Unfinished runs of that name with a complete checkpoint, the newest first. Others have nothing to go on from."""
    found = [run.path for run in sorted(_runs(root, name), reverse=True)]
    return [path for path in found if not is_finished(path) and newest_checkpoint(path / CHECKPOINTS) is not None]


def last_finished(config: JobConfig) -> Path | None:
    """The run of this job's name that was begun last of those that have ended; None where there is none."""
    found = sorted(_runs(Path(config.run_dir), config.name or "run"), reverse=True)
    return next((run.path for run in found if is_finished(run.path)), None)


def _obstacle(path: Path, config: JobConfig) -> str:
    """Why this job does not go on with the run at `path`; empty where it can."""
    try:
        then = settings.load(path / CONFIG, named=False)
    except ConfigError as error:
        return f"its settings cannot be read ({str(error).splitlines()[0]})"
    return _difference(_deciding(then), _deciding(config), "")


def _other_former(path: Path, former: str) -> str:
    """That the run at `path` began from another than this job does; empty where it did not."""
    try:
        then = plain_json.read(path / DATA).get("from", "")
    except (OSError, ValueError, AttributeError):
        return ""  # `_check_data` says so
    before, now = (f"from {one}" if one else "from nothing" for one in (then, former))
    return "" if then == former else f"it began {before!s:.200}, and this job begins {now}"


def _deciding(config: JobConfig) -> dict[str, Any]:
    """The settings that decide what is computed."""
    values = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE}
    values["data"].pop("workers", None)
    values["train"].pop("on_nonfinite", None)  # up to the step that stopped the run, all was finite
    if config.data.path is not None:
        del values["data"]["generator"]
    return values


def _difference(then: Any, now: Any, path: str) -> str:
    """The first setting that differs, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            found = _difference(then.get(key), now.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return ""
    return "" if then == now else f"{path} was {json.dumps(then)} there and is {json.dumps(now)} here"


def _check_data(path: Path, counted: str) -> str:
    """Check that the run at `path` was begun on these data; returns what is to be said of it.

    Raises:
        DataError: it was not, or nobody knows.
    """
    try:
        then = plain_json.read(path / DATA)["counted"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / DATA}: cannot be read, so nobody knows whether the data are the same; use --fresh") from error
    if OF_OLD_RUNS.search(then) and OF_OLD_RUNS.sub("", then) == ORDER.sub("", counted):
        return f"{path} was begun by a version that noted no order of rows: only their number could be compared"
    if then != counted:
        raise DataError(
            f"{path} cannot be resumed, because the data have changed since. Then: {then}. Now: {counted}. Bring the old data "
            "back, or begin a new run with --fresh"
        )
    return ""
