"""Where a rank kills itself: at the n-th event of a kind, counted from a given batch on.

Events are calls of library functions and of the operating system, wrapped from outside; the library knows nothing of it. An event
is named by what it does and to what: "collective forward: send ids", "fsync manifest.json", "rename .saving". Files outside the
folder of checkpoints do not count.
"""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from shardembed.comm.comm import Comm
from shardembed.store.slab import Slab

SLAB = ("lookup", "accumulate", "commit", "step")
ON_PATHS = ("open", "mkdir", "rename", "unlink", "rmdir", "scandir")
ON_FILES = ("pwrite", "fsync", "preadv", "pread")


@dataclass(frozen=True)
class Point:
    """A kill point.

    event: a pattern that matches the whole name of an event. when: "half" is for a write, of which half is done. nth: time that it
    happens, counted from that batch and that save (of so many batches) on. rank: who comes there. everybody: all ranks are killed
    at once, not this one alone. held: a pattern of events, from that save on, that do not begin on this rank until it is killed.
    """

    event: str
    when: Literal["before", "after", "half"] = "before"
    nth: int = 1
    rank: int = 0
    everybody: bool = False
    batch: int = -1
    save: int = 0
    held: str | None = None
    signal: signal.Signals = signal.SIGKILL

    def __str__(self) -> str:
        return f"{self.when} {self.event}" + (f" ({self.nth})" if self.nth > 1 else "")


class Trap:
    """Waits for a point in this process. The trainer says which `batch` it trains on, and which `save` it has begun. events: all
    that came by, in order, with batch and save.
    """

    def __init__(self, rank: int, folder: Path, point: Point | None) -> None:
        self.point = point if point is not None and point.rank == rank else None
        self.events: list[tuple[int, int, str]] = []
        self.batch, self.save = -1, 0
        self._folder = str(folder)
        self._left = point.nth if point is not None else 0
        self._lock = threading.Lock()

    def comes_to(self, name: str) -> bool:
        """An event begins. True if it is the one."""
        with self._lock:
            self.events.append((self.batch, self.save, name))
            point = self.point
            if point is None or self.save < point.save:
                return False
            held = point.held is not None and re.fullmatch(point.held, name) is not None
            matches = self.batch >= point.batch and re.fullmatch(point.event, name) is not None
            self._left -= matches
            here = matches and self._left == 0
        if held:
            threading.Event().wait()
        return here

    def pass_by(self, name: str) -> None:
        """An event of the trainer's own."""
        self._around(name, lambda: None)

    def spring(self) -> None:
        assert self.point is not None
        if self.point.everybody:
            os.killpg(0, self.point.signal)
        else:
            os.kill(os.getpid(), self.point.signal)
        if self.point.signal == signal.SIGKILL:
            signal.pause()  # the signal may reach another thread first

    @contextmanager
    def set(self) -> Iterator[Trap]:
        """Events inside count."""
        with mock.patch.object(Comm, "_run", self._collective(Comm._run)):
            patches = [mock.patch.object(Slab, name, self._slab(name, getattr(Slab, name))) for name in SLAB]
            patches += [mock.patch.object(os, name, self._on_path(name, getattr(os, name))) for name in ON_PATHS]
            patches += [mock.patch.object(os, name, self._on_file(name, getattr(os, name))) for name in ON_FILES]
            for patch in patches:
                patch.start()
            try:
                yield self
            finally:
                for patch in reversed(patches):
                    patch.stop()

    def _around(self, name: str, call: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        here = self.comes_to(name)
        if here and self.point is not None:
            if self.point.when == "before":
                self.spring()
            if self.point.when == "half":
                assert half is not None, f"{name} cannot be done by halves"
                half()
                self.spring()
        answer = call()
        if here:
            self.spring()
        return answer

    def _collective(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(comm: Comm, what: tuple[str, str], *args: Any) -> Any:
            return self._around(f"collective {what[1]}", lambda: run(comm, what, *args))

        return wrapped

    def _slab(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._around(f"slab {name}", lambda: call(*args, **kwargs))

        return wrapped

    def _on_path(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            where = self._inside(path, kwargs.get("dir_fd"))
            if where is None:
                return call(path, *args, **kwargs)
            return self._around(f"{name} {where}", lambda: call(path, *args, **kwargs))

        return wrapped

    def _on_file(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(descriptor: int, *args: Any) -> Any:
            where = self._inside(f"/proc/self/fd/{descriptor}", None)
            if where is None:
                return call(descriptor, *args)
            half = (lambda: call(descriptor, args[0][: len(args[0]) // 2], *args[1:])) if name == "pwrite" else None
            return self._around(f"{name} {where}", lambda: call(descriptor, *args), half)

        return wrapped

    def _inside(self, path: Any, folder: int | None) -> str | None:
        """The last part of a path in the folder of checkpoints, without what chance put there; None where it is not in it."""
        if isinstance(path, int):
            path, folder = f"/proc/self/fd/{path}", None
        path = os.fsdecode(path)
        if path.startswith("/proc/self/fd/"):
            path = os.readlink(path)
        elif folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        if not path.startswith(self._folder):
            return None
        last = path.removeprefix(self._folder).rpartition("/")[2] or "folder"
        return re.sub(r"^(\.saving|\.removed|step)-.*", r"\1", last)
