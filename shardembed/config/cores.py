"""How many threads the `shardembed` command computes with, and how these wait for each other: chosen before torch is loaded, since
the OpenMP library under it reads its settings once, when it is.

Left alone, a thread that waits counts for milliseconds before it sleeps. That costs nothing as long as each has a core; where
others want the cores too, threads that only wait keep away those that are waited for, and a step takes many times as long. Sleeping
at once is no way out: to be woken takes longer than most of a step's operations wait. So it counts for about as long as one of
these, and then sleeps (docs/benchmarks has figures of `benchmarks.threads`).
Programs that import shardembed are left as they are: their threads are theirs to choose.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from itertools import pairwise
from pathlib import Path

COMMAND = "shardembed"
THREADS, WAITING = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
OTHER_WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # what GNU's library and Intel's go by before the policy
# GNU's library goes by the turns, others sleep at once. 1,000 turns wait too short, 20,000 lose 30 % on a busy machine.
CHOSEN_WAITING = {WAITING: "PASSIVE", "GOMP_SPINCOUNT": "5000"}
CGROUPS = Path("/sys/fs/cgroup")
_chosen: list[str] = []


def choose() -> None:
    """For a process that is the command: what the user has not set. Call it before torch is imported."""
    if is_command(sys.argv, sys.orig_argv):
        _chosen[:] = settle(os.environ, usable(), allowance())


def is_command(words: Sequence[str], written: Sequence[str]) -> bool:
    """Whether a process was started as `shardembed ...` or `python -m shardembed ...`.

    Args:
        words: `sys.argv`. written: `sys.orig_argv`.
    """
    if not words:
        return False
    if words[0] == "-m":  # which module is not said yet
        return any(one == "-m" and other == COMMAND for one, other in pairwise(written))
    return os.path.basename(words[0]) == COMMAND


def settle(environment: MutableMapping[str, str], cores: int, allowed: float | None) -> list[str]:
    """Set what is not set yet; the names of that.

    Args:
        cores: that the process may run on. allowed: seconds of them a second, where a container has less.
    """
    found = {}
    if allowed is not None and allowed < cores and THREADS not in environment:
        found[THREADS] = str(max(1, int(allowed)))  # more would be stopped together, for the rest of each period
    if not any(name in environment for name in (WAITING, *OTHER_WAITING)):
        found |= CHOSEN_WAITING
    environment.update(found)
    return list(found)


def usable() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowance(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that this container may use; None: no limit is known."""
    found = []
    for folder in (root / _own_group(own), root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            found += [int(quota) / int(period)] if quota != "max" else []
        except (OSError, ValueError, ZeroDivisionError):
            continue
    try:
        quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        found += [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError, ZeroDivisionError):
        pass
    return min(found, default=None)


def _own_group(own: Path) -> str:
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")


def said(threads: int, environment: Mapping[str, str] = os.environ, chosen: Sequence[str] | None = None) -> str:
    """The threads of this process and how they wait, in words.

    Args:
        threads: that torch computes with. chosen: names that `choose` has set; by default what it did in this process.
    """
    chosen = _chosen if chosen is None else chosen
    count = f"{threads} thread{'s' * (threads > 1)} on {usable()} core{'s' * (usable() > 1)}"
    if THREADS in chosen:
        count += ", as many as this container may keep busy"
    elif THREADS in environment:
        count += f" ({THREADS})"
    if threads == 1:
        return count
    if WAITING in chosen:
        settings = ", ".join(f"{name}={value}" for name, value in CHOSEN_WAITING.items())
        return f"{count}; those that wait sleep after some microseconds ({settings})"
    given = next((f"{name}={environment[name]}" for name in (*OTHER_WAITING, WAITING) if name in environment), None)
    return f"{count}; {f'those that wait: {given}' if given else f'{WAITING} is not set, so those that wait may spin'}"
