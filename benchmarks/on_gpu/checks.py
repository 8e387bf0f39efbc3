"""All checks: correctness in order of risk, then counts, then speed, then what else there is time for."""

from __future__ import annotations

from benchmarks.on_gpu import counting, dynamic, jobs, others, updates
from benchmarks.on_gpu.check import Check

CHECKS: dict[str, Check] = {
    "rowwise": Check(
        "updates by rowwise optimizers: no thread reads what another has written",
        updates.rowwise,
        120,
        "the interpreter has one thread: which of several reads and writes first",
    ),
    "large": Check(
        "tables of more than 2^31 elements", updates.large, 60, "addresses of more than 32 bits: the table has a few rows here"
    ),
    "one-rank": Check(
        "training on one rank, and ahead of the compute on streams of its own",
        jobs.one_rank,
        120,
        "streams, pinned memory, and `prefetched` beside a busy device",
    ),
    "over-gloo": Check(
        "two ranks that share a GPU, over Gloo", jobs.over_gloo, 150, "tensors of a device in Gloo's hands, and `prefetched`"
    ),
    "over-nccl": Check(
        "NCCL: its calls, and ranks with a GPU each", jobs.over_nccl, 150, "anything that NCCL does", needs_gpu=True
    ),
    "dynamic": Check(
        "dynamic tables: who lives, and what they have learned",
        dynamic.dynamic,
        120,
        "compiled code: the map of ids under thousands of threads, and how starts are rounded",
    ),
    "optimizers": Check(
        "every optimizer, by columns and dtypes",
        updates.optimizers,
        150,
        "compiled code: how it rounds, tiles of many rows, and widths above 64",
    ),
    "fbgemm": Check("kernel='fbgemm'", updates.fbgemm, 90, "FBGEMM's kernels for GPUs, and its Adam, AdamW and RowwiseAdam"),
    "launches": Check(
        "launches and waits of a step",
        counting.launches,
        120,
        "what the driver is asked for: operators are counted here, and an operator may be several launches",
    ),
    "bandwidth": Check(
        "lookup and update against copies, plain torch and FBGEMM",
        others.bandwidth,
        120,
        "any speed of a GPU",
        needs_gpu=True,
        measures=True,
    ),
    "tests": Check("the tests that are for GPUs", others.tests, 240, "tests/gpu", needs_gpu=True),
}
