"""Print a digest of plans and bounds: `python -m tests.unit.planner.bits [COUNT]`. The same on any machine with these libraries,
however busy it is.

COUNT small problems, each held to all of its solutions, and a model on eight ranks.
"""

from __future__ import annotations

import hashlib
import sys

from hypothesis import HealthCheck, given, settings

from shardembed import planner
from shardembed.planner import topology, workload
from shardembed.planner.problem import Problem
from shardembed.planner.search import solve
from tests.unit.planner.planning import Solutions, problems

CLOSE = 1e-9  # relative
ALLOWED = [HealthCheck.too_slow, HealthCheck.data_too_large]


def digest(count: int) -> str:
    """Of choices, steps and bounds, to the last bit."""
    told = hashlib.sha256()

    @settings(derandomize=True, database=None, deadline=None, max_examples=count, suppress_health_check=ALLOWED)
    @given(problems())
    def one(drawn: tuple[Problem, Solutions]) -> None:
        problem, every = drawn
        found, best = solve(problem), every.best(problem.capacity)
        if found is None:  # or none was found: then the whole program is asked (`packed`)
            told.update(b"nothing fits")
            return
        assert best is not None
        optimum = float(every.steps[best])
        assert found.bound is not None
        assert found.bound <= optimum * (1 + CLOSE)
        assert found.score.step >= optimum * (1 - CLOSE)
        told.update(repr((found.choices, found.score.step.hex(), found.bound.hex(), found.stopped)).encode())

    one()
    planned = planner.plan(workload.load("synthetic-tiny"), topology.load("h100x8", ranks=8))
    told.update(repr((planned.plan.hash, planned.lower_bound_seconds, planned.estimate.step_seconds)).encode())
    return told.hexdigest()


if __name__ == "__main__":
    print(digest(int(sys.argv[1]) if len(sys.argv) > 1 else 500))
