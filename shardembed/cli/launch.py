"""A torchrun job of several ranks on this machine, for commands that are given --ranks."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence

from shardembed.cli import failures

AGENT_LOGGERS = ("torch.distributed.elastic", "torch.distributed.elastic.agent.server.api")  # the second has a level of its own


def in_job() -> bool:
    """torchrun, or a scheduler, has started this process as one rank of a job."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_ranks(ranks: int, words: Sequence[str]) -> int:
    """Run `python -m shardembed *words` on `ranks` ranks, which find each other over the loopback interface.

    Returns the exit code: 0 when all ranks succeed. Otherwise all are stopped, and the first failure is printed, once.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Several ranks share the cores; torchrun sets the same default.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[failures.QUIET] = "1"
    for name in AGENT_LOGGERS:  # they tell of failures that are told below, and of Ctrl-C
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # a free port
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "shardembed", *words)
    except ChildFailedError as error:
        message, code = failures.first_of(error.failures)
        failures.say(message)
        return code
    except SignalException as signal:
        return 128 + int(signal.sigval)
    finally:
        del os.environ[failures.QUIET]
    return 0
