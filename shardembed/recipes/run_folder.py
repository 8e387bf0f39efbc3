"""The folder of one run, which rank 0 writes: config.yaml, plan.json, data.json, metrics.jsonl, checkpoints/, observed.json (what
its page is made of beside these), summary.json, and the page.

The summary is written last and at once: with it the run is finished, without it the run can be resumed. Whoever works in the folder
holds a lock on `lock`, which the system releases when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from shardembed.checkpoint.folders import MANIFEST, sync_folder
from shardembed.config import plain_json
from shardembed.config.paths import whole_file
from shardembed.embeddings.of_run import SUMMARY
from shardembed.errors import ConfigError

LOCK, METRICS, VOCABULARIES, NAMES = "lock", "metrics.jsonl", "vocabularies", "names"
CONFIG, PLAN, DATA, OBSERVED, PAGE, SCALARS = "config.yaml", "plan.json", "data.json", "observed.json", "run.html", "tensorboard"
SINCE = "since.json"  # of a run that began from another
SETTINGS = "settings"  # what the first line of metrics.jsonl holds


class RunFolder:
    """A folder that this process has locked; use it as a context, which lets go of it.

    Attributes:
        token: what the lock file holds; other ranks tell by it that they see the same folder.
        note: tells the user something.
    """

    def __init__(self, path: Path, lock: int, token: str) -> None:
        self.path, self._lock, self.token = path, lock, token
        self.note: Callable[[str], None] = lambda text: None
        self._lines: list[str] = []  # of metrics.jsonl, still to be written
        self._owed: dict[str, Callable[[], object]] = {}

    @staticmethod
    def make(root: Path, name: str, token: str) -> RunFolder:
        """`<root>/<name>-<time>`, new; the time is UTC's.

        Raises:
            ConfigError: the folder cannot be made.
        """
        made = RunFolder.lock(_make(root, f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"), token)
        assert made is not None, "a new folder is nobody else's"
        return made

    @staticmethod
    def lock(path: Path, token: str) -> RunFolder | None:
        """The folder at `path`; None where another process works in it.

        Raises:
            ConfigError: it cannot be locked.
        """
        lock = None
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            written = token.encode()
            if os.pwrite(lock, written, 0) < len(written):  # over what stands there, which takes no room on a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(lock, len(written))
            os.fsync(lock)  # other machines may look
        except OSError as error:
            if lock is not None:
                os.close(lock)
            if isinstance(error, BlockingIOError):
                return None
            raise ConfigError(f"run_dir: cannot lock {path / LOCK}: {error.strerror}; set run_dir to another folder") from error
        return RunFolder(path, lock, token)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._lock)

    def write(self, name: str, text: str) -> None:
        """Write a file so that it is there whole or not at all, also after the machine has failed."""
        publish(self.path / name, text)

    def attempt(self, name: str, work: Callable[[], object]) -> None:
        """Do `work`, which writes the file of that name, and which training can do without: where it fails, as on a full disk, that
        is said, and it is tried again each time something is logged.
        """
        try:
            work()
        except OSError as error:
            if name not in self._owed:
                self.note(f"{self.path / name} cannot be written: {error.strerror or error}; training goes on, and tries it again")
            self._owed[name] = work
        else:
            if self._owed.pop(name, None) is not None:
                self.note(f"{self.path / name} has been written after all")

    def log(self, records: Iterable[dict[str, Any]], lasting: bool = False) -> None:
        """Append a line for each record to metrics.jsonl; `lasting` brings the file to the disk, as what a checkpoint builds on.
        What cannot be written is kept for the next call.
        """
        self._lines += [json.dumps(record) + "\n" for record in records]
        for name, work in [*self._owed.items()]:
            if name != METRICS:
                self.attempt(name, work)
        self.attempt(METRICS, partial(self._append, lasting))

    def _append(self, lasting: bool) -> None:
        descriptor = os.open(self.path / METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size, data = os.fstat(descriptor).st_size, memoryview("".join(self._lines).encode())
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                if lasting:
                    os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, size)  # no half line, and none twice
                raise
        finally:
            os.close(descriptor)
        self._lines = []

    def keep_metrics(self, steps: int) -> None:
        """Remove what metrics.jsonl has beyond the first `steps` steps: they will be taken again.

        As a rule that is its end, which is cut off: a full disk may have no room for the file once more.
        """
        path = self.path / METRICS
        try:
            lines = path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        kept = [line for line in lines if 0 <= _step_of(line) <= steps or _is_first(line)]
        if kept == lines[: len(kept)]:
            os.truncate(path, sum(map(len, kept)))
        else:
            self.write(METRICS, b"".join(kept).decode())

    def finish(self, summary: dict[str, Any]) -> None:
        """Raises ConfigError where the summary cannot be written."""
        try:
            self.write(SUMMARY, json.dumps(summary, indent=2))
        except OSError as error:
            raise ConfigError(
                f"run_dir: {self.path / SUMMARY} cannot be written: {error.strerror or error}, so the run does not count as "
                "finished. Make room, and give the same command again: it goes on from the newest checkpoint, if there is one"
            ) from error


def publish(path: Path, text: str, beside: str = "new") -> None:
    """Write a file so that it is there whole or not at all. beside: ends its name until then."""
    with whole_file(path, beside) as file:
        file.write(text.rstrip() + "\n" * bool(text))
    sync_folder(path.parent)


def is_run(path: Path) -> bool:
    """A job has worked in that folder."""
    return (path / DATA).is_file() and not (path / MANIFEST).exists()


def run_of(path: Path) -> Path | None:
    """The folder of the run that made a checkpoint, or is meant itself; None where there is none around it."""
    return next((folder for folder in (path, *path.absolute().parents[:2]) if is_run(folder)), None)


def is_finished(path: Path) -> bool:
    return (path / SUMMARY).exists()


def _step_of(line: bytes) -> int:
    """The step that a line of metrics.jsonl is about; -1 where it is about none, or was cut off by a crash."""
    try:
        step = plain_json.loads(line).get("step") if line.endswith(b"\n") else -1
    except (ValueError, AttributeError):
        return -1
    return step if isinstance(step, int) else -1


def _is_first(line: bytes) -> bool:
    """The line that has the settings, and no step."""
    return line.startswith(b'{"%s": ' % SETTINGS.encode()) and line.endswith(b"\n")


def _make(root: Path, name: str) -> Path:
    for attempt in range(1, 1000):  # two runs may start in the same second
        path = root / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError as error:
            if not path.is_dir():  # a file stands where the root, or one of the folders above, should be
                raise ConfigError(f"run_dir: cannot make {path}: {error.strerror}; set run_dir to another folder") from error
        except OSError as error:
            raise ConfigError(f"run_dir: cannot make {path}: {error.strerror}; set run_dir to another folder") from error
        else:
            return path
    raise ConfigError(f"run_dir: no free name like {root / name}; remove old runs")
