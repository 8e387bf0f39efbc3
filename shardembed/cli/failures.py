"""How a failure is told: once, by whoever is in the place to, and with an exit code.

A process on its own, or rank 0 of a job, prints the message. Ranks that a launcher started also leave it in the file that
torchrun names in TORCHELASTIC_ERROR_FILE, so that the launcher can show the first failure of all and nobody prints a traceback for
each rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from shardembed.config.shown import printable
from shardembed.errors import ConfigError, DataError, InputError, NonFiniteError, PlanError, ShardEmbedError

# Losses that are not finite come of the settings or the data, and would come again.
WRONG_INPUT = (ConfigError, DataError, InputError, NonFiniteError, PlanError)
WRONG = 2  # the exit code of wrong input; other failures have 1
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
QUIET = "SHARDEMBED_LAUNCHED"  # for ranks whose launcher (launch.py) prints for them: its process id


@dataclass(frozen=True)
class Told:
    """The failure of a job.

    Attributes:
        message: what happened.
        code: the exit code.
        advice: what to do about it, where the message does not say so.
    """

    message: str
    code: int
    advice: str = ""

    @property
    def may_pass(self) -> bool:
        """Whether the same command could succeed when it is run again: wrong input stays wrong."""
        return self.code != WRONG

    def __str__(self) -> str:
        return f"{self.message}; {self.advice}" if self.advice else self.message


@contextlib.contextmanager
def interrupts_arrive() -> Iterator[None]:
    """Have Ctrl-C end a command also when it comes while C code calls back into Python, as Numba's compiler does: nothing can be
    raised there, so that Python would print the interrupt and go on.
    """
    before = sys.unraisablehook
    asked: list[threading.Timer] = []

    def ask_again(unraisable: sys.UnraisableHookArgs) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            return before(unraisable)
        # Later, from another thread: at once, it would interrupt this function.
        again = threading.Timer(0.05, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
        again.daemon = True
        again.start()
        asked.append(again)

    sys.unraisablehook = ask_again
    try:
        yield
    finally:
        sys.unraisablehook = before
        late = [again for again in asked if again.is_alive()]
        for again in late:  # it would come while Python ends, where nobody can say what it was
            again.cancel()
    if late:
        raise KeyboardInterrupt


def exit_code(error: BaseException) -> int:
    return WRONG if isinstance(error, WRONG_INPUT) else 1


def in_launched_rank() -> bool:
    """A launcher started this process and will read its error file."""
    return ERROR_FILE in os.environ


def report(error: Exception) -> int:
    """Print `error`, or hand it to the launcher; returns the exit code."""
    if isinstance(error, ShardEmbedError):
        text = str(error)
    else:
        trace = "".join(traceback.format_exception(error)).rstrip()
        text = f"unexpected error on rank {os.environ.get('RANK', '0')}\n{trace}"
    if in_launched_rank():
        _leave(printable(text), exit_code(error))  # torchrun prints it too
    rank = os.environ.get("RANK", "0")
    if QUIET in os.environ:
        pass
    elif rank == "0":
        say(text)
    elif not in_launched_rank():  # nobody else would tell of a failure of this rank alone
        say(text, f"rank {rank}: ")
    return exit_code(error)


def unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """For `sys.excepthook`: a traceback goes through the same door as every message."""
    print(printable("".join(traceback.format_exception(kind, error, trace)).rstrip()), file=sys.stderr, flush=True)


def say(text: str, prefix: str = "") -> None:
    print(printable(f"shardembed: error: {prefix}{text}"), file=sys.stderr, flush=True)


def note(text: str) -> None:
    """Something to know that is not the end."""
    print(printable(f"shardembed: {text}"), file=sys.stderr, flush=True)


def _leave(text: str, code: int) -> None:
    """Write the error file, as torchrun reads it, with what `launch.py` wants to know besides."""
    # Where even this cannot be written, the launcher says that there was no message; what failed first is worth more.
    content = {"message": text, "timestamp": int(time.time()), "nanoseconds": time.time_ns(), "exit_code": code}
    with contextlib.suppress(OSError):
        Path(os.environ[ERROR_FILE]).write_text(json.dumps(content))


def first_of(failures: dict[int, Any]) -> Told:
    """The first of several ranks' failures, as torchrun's launcher reports them."""
    told = {rank: failure for rank, failure in failures.items() if "nanoseconds" in (failure.error_file_data or {})}
    if told:
        data = min((failure.error_file_data for failure in told.values()), key=lambda data: data["nanoseconds"])
        return Told(data["message"], data["exit_code"])
    rank, failure = min(failures.items(), key=lambda item: item[1].timestamp)
    if failure.exitcode < 0:
        advice = "if memory ran out, use more ranks or a smaller model"
        return Told(f"rank {rank} was killed by {failure.signal_name()}", 1, advice)
    advice = "look above for what it printed"
    return Told(f"rank {rank} ended with exit code {failure.exitcode} and left no message", 1, advice)
