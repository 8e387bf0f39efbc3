"""A torchrun job of several ranks on this machine, for commands that are given --ranks."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Callable, Sequence

from shardembed.cli import failures
from shardembed.cli.failures import Told
from shardembed.comm import lifeline
from shardembed.errors import ConfigError

AGENT_LOGGERS = ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api")  # the second has a level of its own


def in_job() -> bool:
    """torchrun, or a scheduler, has started this process as one rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def ranks_of(wanted: int | None) -> int:
    """How many ranks --ranks asks for, or those of the job that this process is in.

    Raises:
        ConfigError: there can be no such number of them.
    """
    if wanted is not None and wanted < 1:
        raise ConfigError(f"--ranks {wanted}: the number of ranks must be at least 1")
    if in_job():
        given = int(os.environ["WORLD_SIZE"])
        if wanted is not None and wanted != given:
            raise ConfigError(f"--ranks {wanted}: this process belongs to a job of {given} ranks already; leave --ranks out")
        return given
    return wanted or 1


def end_with_launcher() -> None:
    """Have the system end this rank together with the launcher that started it. Left alone, it would train on and keep the folder
    of its run locked.
    """
    if failures.QUIET in os.environ:
        lifeline.end_with(int(os.environ[failures.QUIET]))
    else:
        lifeline.end_with_agent()


def leave() -> None:
    """The end of a rank that has done its work: what it printed is out, and its process group is over."""
    import torch.distributed as dist

    sys.stdout.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


def run_ranks(ranks: int, words: Sequence[str], max_restarts: int = 0, left: Callable[[str], str] | None = None) -> int:
    """Run `python -m shardembed *words` on `ranks` ranks, which find each other over the loopback interface.

    When a rank fails, all are stopped, and started again up to `max_restarts` times unless the input was wrong.

    `left` says, by the id of the launch, what ranks that were stopped have left; empty where there is nothing to say.

    Returns the exit code: 0 when all ranks succeed. Otherwise the first failure of the last start is printed, once.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    from shardembed.cli import loopback

    # Several ranks share the cores; torchrun sets the same default.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Every rank would warn that DistributedDataParallel looks for unused parameters, which it is meant to.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    loopback.register()
    os.environ[failures.QUIET] = str(os.getpid())
    run_id = uuid.uuid4().hex  # kept over restarts: by it a run knows its own beginnings
    restarts = 0
    try:
        while (told := _launch(ranks, words, run_id)) is not None:
            if restarts == max_restarts or not told.may_pass:
                given_up = f"; given up after {restarts} restart{'s' * (restarts > 1)}" if restarts and told.may_pass else ""
                failures.say(f"{told}{given_up}")
                if told.may_pass:
                    _note(left, run_id)
                return told.code
            restarts += 1
            failures.note(f"{told.message}; restart {restarts} of {max_restarts}")
    except SignalException as received:  # Ctrl-C, for example
        _note(left, run_id)
        return 128 + int(received.sigval)
    finally:
        del os.environ[failures.QUIET]
    return 0


def _note(left: Callable[[str], str] | None, run_id: str) -> None:
    if left is not None and (text := left(run_id)):
        failures.note(text)


def told_of(ranks: int, words: Sequence[str]) -> Told | None:
    """As `run_ranks`, without printing: what failed, or nothing."""
    from shardembed.cli import loopback

    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    loopback.register()
    os.environ[failures.QUIET] = str(os.getpid())
    try:
        return _launch(ranks, words, uuid.uuid4().hex)
    finally:
        del os.environ[failures.QUIET]
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


def _launch(ranks: int, words: Sequence[str], run_id: str) -> Told | None:
    """One start of all ranks; what failed, or nothing."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from shardembed.cli import loopback

    # They tell of failures that are told here, and of Ctrl-C. After the import, which sets levels of its own.
    for name in AGENT_LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=run_id,
        rdzv_backend=loopback.BACKEND,
        local_addr=loopback.ADDRESS,
        max_restarts=0,  # torch's would also restart when the input is wrong, and tell nobody
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "shardembed", *words)
    except ChildFailedError as error:
        return failures.first_of(error.failures)
    return None
