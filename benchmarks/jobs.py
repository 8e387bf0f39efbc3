"""Runs a benchmark on ranks of this machine: one job for each number of ranks, one after the other."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import shardembed as se
from benchmarks.options import Options
from shardembed.cli import launch

Result = dict[str, Any]
NOISY = ("torchrec", "torch.distributed", "fbgemm_gpu", "torch.distributed._shard", "root")


class BenchFailedError(Exception):
    """A job of ranks failed, and has said why. code: what this process is to exit with."""

    def __init__(self, code: int) -> None:
        super().__init__(f"a benchmark's job ended with exit code {code}")
        self.code = code


def run_jobs(ranks: Sequence[int], words: Sequence[str]) -> list[Result]:
    """The results of `python -m shardembed *words --child FILE` on each number of ranks, in order.

    Raises:
        BenchFailedError: a job failed.
    """
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in ranks:
            out = Path(folder) / f"{number}.json"
            code = launch.run_ranks(number, [*words, f"--child={out}"])
            if code:
                raise BenchFailedError(code)
            results += json.loads(out.read_text())
    return results


def rank_main(measure: Callable[[Options], list[Result]], options: Options, out: Path) -> None:
    """What each rank of a job runs; rank 0 writes the results."""
    torch.set_num_threads(1)
    for name in NOISY:  # what they say is not about the figures
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("shardembed").setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    se.init(keep_memory=options.keep_memory)
    results = measure(options)
    if se.rank() == 0:
        out.write_text(json.dumps(results))


def say(text: str) -> None:
    """Progress, from rank 0."""
    if se.rank() == 0:
        print(text, file=sys.stderr, flush=True)
