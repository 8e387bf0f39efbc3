"""Processes that end with the one that started them, however that one ends.

A rank that outlives its launcher trains on unseen, keeps its memory and the lock of its run, and the same command then starts a
second run beside it. Whatever is killed by SIGKILL can end nobody, so the system has to. On Linux alone; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from pathlib import Path

PR_SET_PDEATHSIG = 1
# What a torchrun agent puts into the environment of each rank; together they differ between any two agents.
OF_AGENT = (b"TORCHELASTIC_RUN_ID", b"TORCHELASTIC_ERROR_FILE", b"MASTER_PORT", b"LOCAL_RANK")


def end_with(parent: int) -> None:
    """Have the system end this process together with `parent`, which started it.

    Strictly, with the thread of it that did: launchers and ranks start others from a thread that waits for them.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def end_with_agent() -> None:
    """Have this rank end together with the torchrun agent that started it, if one did. An agent that ends by itself has waited for
    its ranks or ended them, so this is for agents that are killed.

    Where something stands between, as a script that binds cores does, a thread waits for the agent's end.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    agent = _agent(parent)
    if agent == parent:
        end_with(parent)
    elif agent is not None:
        _watch(agent)


def _agent(parent: int) -> int | None:
    """The nearest process above that was not started with what the agent gave to this rank; None where that cannot be seen."""
    try:
        mine = _given(os.getpid())
        above = parent
        while mine[0] is not None and _given(above) == mine:  # the agent's own fork, as of multiprocessing, was given nothing
            above = int(Path(f"/proc/{above}/stat").read_bytes().rpartition(b")")[2].split()[1])
    except (OSError, ValueError, IndexError):  # it is another user's, or has ended
        return None
    return above if above > 0 else None


def _given(process: int) -> tuple[bytes | None, ...]:
    """What it was started with of `OF_AGENT`, whatever it has set since."""
    pairs = (entry.partition(b"=") for entry in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"))
    found = {name: value for name, _, value in pairs}
    return tuple(found.get(name) for name in OF_AGENT)


def _watch(agent: int) -> None:
    try:
        descriptor = os.pidfd_open(agent)
    except ProcessLookupError:  # it has ended since
        os._exit(1)
    except OSError:  # the kernel is older than 5.3
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True, name="end with the agent").start()
