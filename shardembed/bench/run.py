"""A short benchmark of the embedding part of a training step: forward, backward and rowwise Adagrad.

    python -m shardembed.bench.run [--ranks 1 2] [--rounds 20] [--markdown docs/benchmarks/PAGE.md]

Every rank count is a torchrun job of its own. Inside it, all contenders take turns on the same batches, step by step, so that a
noisy machine troubles them alike. Ids follow Zipf's law with exponent 1.2; a step ends with a barrier.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import shardembed as se
from shardembed.bench import peers

Step = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Workload:
    """`tables` tables of `rows` x `dim`; a rank's batch has `batch` samples with `ids` ids for each table."""

    name: str
    tables: int = 8
    rows: int = 1_000_000
    dim: int = 64
    batch: int = 1024
    ids: int = 10
    zipf: float = 1.2
    pooled: bool = True


WORKLOADS = (
    Workload("pooled"),
    Workload("sequences", tables=4, pooled=False),
    Workload("overhead", tables=26, rows=100_000, dim=16, batch=4, ids=1),
)


def ours(workload: Workload, kind: str, packing: str) -> Step:
    """A training step of ours under one kind of plan."""
    ranks = list(range(se.world_size()))
    pooling = "sum" if workload.pooled else None
    tables = [se.TableConfig(f"t{i}", workload.rows, workload.dim, pooling=pooling) for i in range(workload.tables)]
    placements = {
        "row_wise": lambda i: se.row_wise(packing=packing),  # type: ignore[arg-type]
        "table_wise": lambda i: se.table_wise(i % len(ranks), packing=packing),  # type: ignore[arg-type]
    }
    plan = {table.name: placements[kind](i) for i, table in enumerate(tables)}
    collection = se.EmbeddingCollection(tables, optimizer=se.optim.RowwiseAdagrad(lr=0.01), plan=plan)
    optimizer = se.Optimizer(collection)

    def step(ids: torch.Tensor) -> None:
        shaped = ids.view(workload.tables, workload.batch, workload.ids)
        outputs = collection({table.name: shaped[i] for i, table in enumerate(tables)})
        vectors = torch.cat([output.flatten(0, -2) for output in outputs.values()])
        vectors.backward(torch.ones_like(vectors))
        optimizer.step()

    return step


def contenders(workload: Workload) -> dict[str, Step]:
    """All ways to make the step that this machine and rank count allow."""
    if se.world_size() == 1:
        found: dict[str, Step] = {"shardembed": ours(workload, "table_wise", "unique")}
        return {**found, "nn.EmbeddingBag + torch Adagrad": peers.plain_torch(workload), **peers.fbgemm(workload)}
    found = {}
    for kind in ("row_wise", "table_wise"):
        for packing in ("unique", "bag") if workload.pooled else ("unique",):
            found[f"shardembed {kind} {packing}"] = ours(workload, kind, packing)
        found.update(peers.torchrec(workload, kind))
    return found


def batches(workload: Workload, rank: int, count: int = 4) -> list[torch.Tensor]:
    """This rank's ids, `[tables * batch * ids]`; the same for every contender."""
    generator = np.random.default_rng(rank)
    size = workload.tables * workload.batch * workload.ids
    return [torch.from_numpy((generator.zipf(workload.zipf, size) - 1) % workload.rows) for _ in range(count)]


def measure(workload: Workload, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each contender's steps, in turn."""
    comm, runners = se.Comm.of(), contenders(workload)
    times: dict[str, list[float]] = {name: [] for name in runners}
    drawn = batches(workload, comm.rank)
    barrier = torch.zeros(1)
    for number in range(rounds + 3):  # the first three warm caches and buffers
        for name, step in runners.items():
            comm.all_reduce("benchmark barrier", barrier)
            start = time.perf_counter()
            step(drawn[number % len(drawn)])
            comm.all_reduce("benchmark barrier", barrier)
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def rank_main(rounds: int, out: Path) -> None:
    """What each rank runs; rank 0 writes the times."""
    torch.set_num_threads(1)
    se.init()
    results = [{"workload": asdict(workload), "times": measure(workload, rounds)} for workload in WORKLOADS]
    if se.rank() == 0:
        out.write_text(json.dumps(results))


def page(results: dict[int, list[dict[str, object]]], command: str) -> str:
    """The Markdown page: date, hardware, command, and a table a workload and rank count."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?")
    lines = [
        f"# A training step, {datetime.date.today()}",
        "",
        f"`{command}` on {os.cpu_count()} cores ({cpu}), {platform.platform()}, torch {torch.__version__}, Gloo on loopback,",
        "one thread a rank. Forward, backward and rowwise Adagrad (plain torch: Adagrad) of the embedding part, in milliseconds,",
        "contenders in turn on the same ids. Ranks that share cores measure the total CPU work, not scaling.",
    ]
    for ranks, workloads in results.items():
        for result in workloads:
            shape = ", ".join(f"{key} {value}" for key, value in result["workload"].items() if key != "name")  # type: ignore[attr-defined]
            lines += ["", f"## {result['workload']['name']}, {ranks} rank(s)", "", shape, ""]  # type: ignore[index]
            lines += ["| contender | median ms | quartiles | least |", "|---|---|---|---|"]
            for name, times in result["times"].items():  # type: ignore[attr-defined]
                low, middle, high = statistics.quantiles(times, n=4)
                lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {min(times):.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of each contender")
    parser.add_argument("--markdown", type=Path, help="also write the page here")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        rank_main(args.rounds, args.child)
        return 0
    results: dict[int, list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        for ranks in args.ranks:
            launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            child = ["-m", "shardembed.bench.run", "--rounds", str(args.rounds), "--child", str(out)]
            subprocess.run([*launch, *child], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            results[ranks] = json.loads(out.read_text())
    text = page(results, "python -m shardembed.bench.run " + " ".join(sys.argv[1:]))
    print(text)
    if args.markdown:
        args.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
