"""From nothing to the first step: import, plan, build and one step of a model with 26 tables, in fresh processes, in turn with
TorchRec's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import pages, startup_child
from benchmarks.figures import ratio, spread
from benchmarks.jobs import BenchFailedError, Result
from benchmarks.options import Options
from benchmarks.startup_child import STAGES, TORCH

TITLE = "Import, plan, build and first step"
ABOUT = (
    "A model of 26 tables of 100,000 x 16 and two dense layers, planned by each library's own planner, built, and trained for one "
    "step of 64 samples with one id a table. Processes are fresh, on each rank alike, and take turns; files, bytecode and compiled "
    "kernels are in the page cache. The import of torch alone, which nobody can do without, is a part of the import. Joining the "
    "process group is in none of the stages. Seconds on the slowest rank, medians over rounds with their quartiles."
)
WHO = ("shardembed", "TorchRec")
__all__ = ["ABOUT", "TITLE", "collect", "page"]


def collect(options: Options, words: list[str]) -> list[Result]:
    """Seconds by stage, library and round, for each number of ranks. The first round fills the page cache, and is left out."""
    del words
    results = []
    for ranks in options.ranks:
        seconds: dict[str, list[dict[str, float]]] = {who: [] for who in WHO if options.wants(who)}
        for number in range(-1, options.rounds):
            for who, found in seconds.items():
                taken = start(who, ranks)
                if number >= 0:
                    found.append(taken)
            print(f"{ranks} rank(s), round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        results.append({"ranks": ranks, "seconds": seconds})
    return results


def start(who: str, ranks: int) -> dict[str, float]:
    """One start on `ranks` ranks: seconds by stage, on the slowest rank each.

    Raises:
        BenchFailedError: a rank failed, and has said why.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port}
    source = Path(startup_child.__file__)
    job |= {"PYTHONPATH": os.pathsep.join([str(source.parents[1]), os.environ.get("PYTHONPATH", "")])}
    job |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
    # A checkout keeps its bytecode as an installed package does, which the first round writes.
    job |= {"PYTHONDONTWRITEBYTECODE": ""}
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(ranks):
            environment = {
                **os.environ,
                **{name: str(value) for name, value in job.items()},
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
            }
            words = [sys.executable, "-c", source.read_text(), who, str(Path(folder) / f"{rank}.json")]
            running.append(subprocess.Popen(words, env=environment))
        codes = [process.wait() for process in running]
        if any(codes):
            raise BenchFailedError(1)
        told: list[dict[str, float]] = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(ranks)]
    return {stage: max(each[stage] for each in told) for stage in (TORCH, *STAGES)}


def page(results: list[Result], path: Path | None) -> list[str]:
    del path  # no pictures
    lines: list[str] = []
    for result in results:
        lines += [f"## {result['ranks']} rank{'s' * (result['ranks'] > 1)}", "", *_table(result["seconds"]), ""]
    return lines


def _table(seconds: dict[str, list[dict[str, float]]]) -> list[str]:
    rows = []
    for stage in (TORCH, *STAGES, "all"):
        times = {who: [_of(each, stage) for each in found] for who, found in seconds.items()}
        cells = [f"{spread(values):.2f}" for values in times.values()]
        beside = [f"{ratio(times['shardembed'], times['TorchRec']):.2f}"] if len(times) == 2 else []
        rows.append([stage, *cells, *beside])
    return pages.table(["seconds", *seconds, *["ours / theirs"] * (len(seconds) == 2)], rows)


def _of(taken: dict[str, Any], stage: str) -> float:
    return sum(taken[each] for each in STAGES) if stage == "all" else taken[stage]
