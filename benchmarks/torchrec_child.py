"""TorchRec's default planner in a process of its own, so that its minutes and its memory can be limited."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from benchmarks.torchrec_space import Assigned, Space, quiet

GRACE = 240.0  # seconds beyond the limit: TorchRec looks at its clock between proposals, and not while it enumerates


@dataclass(frozen=True)
class Found:
    """What TorchRec's planner gave: a plan, or why there is none."""

    assigned: Assigned | None
    seconds: float
    stopped: bool  # at the limit: the best plan until then
    error: str = ""


def default_plan(space: Space, limit: float) -> Found:
    """Plan with `EmbeddingShardingPlanner` and its defaults; stopped after `limit` seconds of proposals."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_run, args=(theirs, space, limit), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(limit + GRACE):
            return Found(None, limit + GRACE, True, "no answer within the limit")
        return ours.recv()
    except EOFError:
        return Found(None, 0.0, False, "the planner's process ended without an answer")
    finally:
        child.kill()
        child.join()


def remembered(path: Path, key: str, space: Space, limit: float) -> Found:
    """`default_plan`, kept in a file of results by `key`."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        found = default_plan(space, limit)
        known = json.loads(path.read_text()) if path.exists() else {}
        known[key] = found.__dict__
        path.write_text(json.dumps(known, default=list))
    kept = known[key]
    assigned = kept["assigned"] and {name: (kind, tuple(ranks)) for name, (kind, ranks) in kept["assigned"].items()}
    return Found(assigned, kept["seconds"], kept["stopped"], kept["error"])


def _run(answers: Connection, space: Space, limit: float) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    answers.send(planned(space, limit))


def planned(space: Space, limit: float) -> Found:
    """As `default_plan`, in this process."""
    from torchrec.distributed.planner import EmbeddingShardingPlanner
    from torchrec.distributed.planner.types import PlannerError

    with quiet():
        planner = EmbeddingShardingPlanner(
            topology=space.topology, batch_size=space.batch_size, constraints=space.constraints, timeout_seconds=round(limit)
        )
        module = space.module
        start = time.perf_counter()
        try:
            planner.plan(module, space.sharders)
        except PlannerError as error:
            return Found(None, time.perf_counter() - start, False, str(error.error_type.value))
        seconds = time.perf_counter() - start
    best = planner._best_plan or []
    assigned = {option.name: (option.sharding_type, tuple(cast(int, shard.rank) for shard in option.shards)) for option in best}
    return Found(assigned, seconds, seconds > limit)
