"""Speed and memory of checkpoints, beside what the same disk does with the same bytes.

    python -m benchmarks.checkpoint [--ranks 2] [--gigabytes 4] [--rounds 3] [--folder DIR] [--markdown PAGE.md]

One table of `--gigabytes` (10^9 bytes) cut by rows. In every round all take turns, each rank with its share: plain writes of
8 MiB and one fsync; hashing alone, in memory; a save; plain reads; a load; an increment after 1 % of the rows have changed; a
background save. Files are dropped from the page cache before they are read, as far as the kernel lets a process ask for it. Times
are from barrier to barrier.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import shardembed as se
from benchmarks import pages
from shardembed.checkpoint.format.blocks import hash_of

BLOCK = 8 << 20
DIM = 64
CHANGED = 0.01


def barrier() -> None:
    se.Comm.of().all_reduce("benchmark barrier", torch.zeros(1))


def timed(work: Callable[[], object]) -> float:
    """Seconds until the last rank is done."""
    barrier()
    began = time.perf_counter()
    work()
    barrier()
    return time.perf_counter() - began


def memory_of(work: Callable[[], object]) -> int:
    """Bytes of memory that this process needs at most, while it does `work`, beyond what it had before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest level so far
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def write_plainly(path: Path, data: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for start in range(0, len(data), BLOCK):
        os.write(descriptor, data[start : start + BLOCK])
    os.fsync(descriptor)
    os.close(descriptor)


def hash_plainly(data: memoryview) -> None:
    for start in range(0, len(data), BLOCK):
        hash_of(data[start : start + BLOCK])


def read_plainly(path: Path) -> None:
    buffer = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def drop_cached(folder: Path) -> None:
    """Ask the kernel to forget the files of a folder."""
    for path in folder.iterdir():
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def build(gigabytes: float) -> tuple[se.EmbeddingCollection, se.Optimizer]:
    rows = int(gigabytes * 1e9) // (4 * DIM)
    table = se.TableConfig("table", rows, DIM, pooling=None)
    tables = se.EmbeddingCollection([table], optimizer=se.optim.RowwiseAdagrad(lr=0.01), plan=se.row_wise())
    return tables, se.Optimizer(tables)


def change_rows(tables: se.EmbeddingCollection, optimizer: se.Optimizer) -> None:
    """A step that touches 1 % of the rows, all ranks together."""
    rows = tables.tables[0].num_embeddings
    ids = torch.randperm(rows)[: int(rows * CHANGED) // se.world_size()]
    tables({"table": ids})["table"].sum().backward()
    optimizer.step()


def measure(gigabytes: float, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of each contender by round, and memory. Collective."""
    comm = se.Comm.of()
    tables, optimizer = build(gigabytes)
    share = next(iter(tables.local_shards())).weights.detach().reshape(-1).view(torch.uint8).numpy().data
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    mine = plain / f"rank-{comm.rank}"
    root = folder / "checkpoints"
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}

    def run(name: str, work: Callable[[], object]) -> None:
        took: list[float] = []
        used = memory_of(lambda: took.append(timed(work)))
        seconds.setdefault(name, []).append(took[0])
        memory[name] = max(memory.get(name, 0), used)

    pending: list[se.PendingSave] = []

    def save(**more: Any) -> Path:
        return se.save_checkpoint(root, tables, optimizer=optimizer, keep=1, **more)

    for _ in range(rounds):
        run("plain write", lambda: write_plainly(mine, share))
        run("hashing alone", lambda: hash_plainly(share))
        run("save", save)
        newest = se.newest_checkpoint(root)
        assert newest is not None
        drop_cached(plain)
        drop_cached(newest)
        run("plain read", lambda: read_plainly(mine))
        run("load", lambda: se.load_checkpoint(root, tables, optimizer=optimizer))
        save(incremental=True)  # a full one, for increments to stand on
        change_rows(tables, optimizer)
        run("increment", lambda: save(incremental=True))
        run("background save, until training goes on", lambda: pending.append(_start(root, tables, optimizer)))
        run("background save, the rest", lambda: pending.pop().wait())
    used = {name: float(value) for name, value in memory.items()}
    worst = torch.tensor(list(used.values()), dtype=torch.float64)
    comm.all_reduce("benchmark: largest memory", worst, maximum=True)
    return {"seconds": seconds, "memory": dict(zip(used, worst.tolist(), strict=True)), "bytes": gigabytes * 1e9}


def _start(root: Path, tables: se.EmbeddingCollection, optimizer: se.Optimizer) -> se.PendingSave:
    return se.async_save_checkpoint(root, tables, optimizer=optimizer, keep=1)


def page(result: dict[str, Any], ranks: int) -> str:
    """The page in Markdown."""
    seconds, size = result["seconds"], result["bytes"]
    base = {"save": "plain write", "load": "plain read"}

    def row(name: str) -> list[str]:
        middle = statistics.median(seconds[name])
        rate = "" if name == "increment" or "background" in name else f"{size / middle / 1e9:.2f}"
        ratios = [a / b for a, b in zip(seconds[base[name]], seconds[name], strict=True)] if name in base else []
        share = f"{statistics.median(ratios):.2f}" if ratios else ""
        spread = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        memory = "" if "plain" in name or "hashing" in name else f"{result['memory'][name] / 2**20:.0f}"
        return [name, f"{middle:.2f}", spread, rate, share, memory]

    head = ("what", "seconds", "spread", "GB/s", "of plain speed", "MiB more memory a rank")
    lines = pages.heading(f"Checkpoints of {size / 1e9:g} GB on {ranks} ranks", "benchmarks.checkpoint")
    lines += pages.paragraph(
        "One table cut by rows, with the state of RowwiseAdagrad. Medians over rounds in which all took turns; the share is the",
        "median of the rounds' ratios. Memory is the highest level of any rank beyond what it had before; a background save copies",
        "the rank's whole share. An increment writes the 1 % of rows that changed. Plain writes and reads are of 8 MiB, with one",
        "fsync; files are dropped from the page cache before they are read. Hashing alone is what a rank's share takes in memory,",
        "on one thread a rank: near the time of plain writes, as on few cores beside a fast disk, it sets the speed.",
    )
    return "\n".join([*lines, *pages.table(head, [row(name) for name in seconds]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    parser.add_argument("--markdown", help="write the page here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        se.init()
        result = measure(arguments.gigabytes, arguments.rounds, Path(arguments.folder))
        if se.rank() == 0:
            Path(arguments.child).write_text(json.dumps(result))
        return
    folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=arguments.folder))
    try:
        text = page(_in_job(arguments, folder), arguments.ranks)
    finally:
        shutil.rmtree(folder)
    print(text)
    if arguments.markdown:
        Path(arguments.markdown).write_text(text)


def _in_job(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    result = folder / "result.json"
    job = ["torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}", "-m", "benchmarks.checkpoint"]
    words = [
        "--child",
        str(result),
        "--folder",
        str(folder),
        "--gigabytes",
        str(arguments.gigabytes),
        "--rounds",
        str(arguments.rounds),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *job, *words], check=True, env=environment)
    return json.loads(result.read_text())


if __name__ == "__main__":
    main()
