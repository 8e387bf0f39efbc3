"""The Triton kernels on a GPU: lookup against the memory's bandwidth, merge and update against FBGEMM.

    python -m benchmarks.gpu [--widths 8 32 64 128 256] [--ids 1 10 30 100] [--skews 0 1.05 1.15] [--markdown PAGE.md]

One table, a batch of `--bags` bags of `--ids` each, whose ids follow Zipf's law (skew 0: evenly), rowwise Adagrad. In every round
all take turns, each timed by the device's own clock after its caches have been overwritten. Bandwidth is that of a copy, read and
written bytes together, measured in the same run. Bytes of a lookup are counted as if nothing were read twice from a cache, so
skewed ids can seem to go beyond the memory. FBGEMM sorts inside of its backward; our sort is made in the forward, and its time is
shown in a column of its own and counted in the ratio. `--device cpu` runs in Triton's interpreter, to try the logic only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import pages
from shardembed.kernels import grouping, reference
from shardembed.kernels.formulas import Step
from shardembed.kernels.gradients import Gradients
from shardembed.kernels.kernel import SlabData
from shardembed.optim import RowwiseAdagrad

GIB = 1 << 30
OPTIMIZER = RowwiseAdagrad(lr=0.01)


@dataclass(frozen=True)
class Size:
    """One case."""

    rows: int
    bags: int
    width: int
    ids: int
    skew: float


@dataclass(frozen=True)
class Times:
    """Seconds, the median of all rounds. order, update: ours. FBGEMM's and plain torch's forward, and backward with the update."""

    size: Size
    lookup: float
    order: float
    update: float
    peers: dict[str, tuple[float, float]]

    def bandwidth(self) -> float:
        """Bytes a second of the lookup."""
        size = self.size
        return size.bags * (size.ids * (4 * size.width + 8) + 4 * size.width + 8) / self.lookup

    def ratios(self, peer: str) -> tuple[float, float]:
        """How many times longer a peer takes, forward and backward."""
        forward, backward = self.peers[peer]
        return forward / self.lookup, backward / (self.order + self.update)


def draw(size: Size, device: torch.device) -> torch.Tensor:
    """Ids, `[bags * ids]`: Zipf's law by the inverse of its continuous form, hot rows anywhere in the table."""
    numbers = torch.Generator(device).manual_seed(0)
    shares = torch.rand(size.bags * size.ids, generator=numbers, device=device, dtype=torch.float64)
    if size.skew == 1.0:
        ranks = size.rows**shares
    else:
        power = 1.0 - size.skew
        ranks = (shares * (size.rows**power - 1.0) + 1.0) ** (1.0 / power)
    places = torch.randperm(size.rows, generator=numbers, device=device)
    return places[(ranks.long() - 1).clamp_(0, size.rows - 1)]


class Clock:
    """Times work on a device, its caches cold."""

    def __init__(self, device: torch.device, flushed: int) -> None:
        self._cuda = device.type == "cuda"
        self._flushed = torch.empty(flushed, dtype=torch.uint8, device=device)

    def seconds(self, work: Callable[[], object]) -> float:
        self._flushed.zero_()
        if not self._cuda:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        began.record()
        work()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1000


def copy_bandwidth(device: torch.device, clock: Clock, size: int, rounds: int) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / statistics.median(clock.seconds(lambda: target.copy_(source)) for _ in range(rounds + 2))


def fbgemm(size: Size, device: torch.device) -> Any:
    """FBGEMM's table-batched embedding bags with one table, or None where it is not installed or does not serve the width."""
    if size.width % 4:
        return None
    try:
        from fbgemm_gpu.split_embedding_configs import EmbOptimType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
    except (ImportError, OSError):
        return None
    cuda = device.type == "cuda"
    location = EmbeddingLocation.DEVICE if cuda else EmbeddingLocation.HOST
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(size.rows, size.width, location, ComputeDevice.CUDA if cuda else ComputeDevice.CPU)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=OPTIMIZER.lr,
        device=device if cuda else torch.device("cpu"),
    )


def plain(data: SlabData, rows_E: torch.Tensor, waiting: Gradients) -> dict[str, Any]:
    """The reference on the same device."""

    def update() -> None:
        reference.update(data, *grouping.merge(waiting, len(data.weights)), Step(OPTIMIZER.lr, 1))

    return {"forward": lambda: reference.lookup(data.weights, rows_E, waiting.offsets, torch.float32), "backward": update}


def measure(size: Size, device: torch.device, clock: Clock, rounds: int) -> Times:
    """Everything on one case, in turns."""
    from shardembed.kernels.triton.kernel import TritonKernel
    from shardembed.kernels.triton.order import direct_of, order

    weights = torch.randn(size.rows, size.width, device=device)

    def data() -> SlabData:
        return SlabData(weights.clone(), {"sum": torch.zeros(size.rows, device=device)}, OPTIMIZER, torch.float32)

    ours = TritonKernel(data())
    rows_E, offsets = draw(size, device), torch.arange(0, size.bags * size.ids + 1, size.ids, device=device)
    grads = torch.randn(size.bags, size.width, device=device)
    waiting = Gradients(rows_E, offsets, grads)
    direct = direct_of(size.width)  # as slabs have it
    made = order(rows_E, offsets, size.rows, direct)
    works: dict[str, Callable[[], object]] = {
        "lookup": lambda: ours.lookup(rows_E, offsets),
        "order": lambda: order(rows_E, offsets, size.rows, direct),
        "update": lambda: ours.update(waiting, made, False, Step(OPTIMIZER.lr, 1), 1.0),
    }
    peers = {"plain torch": plain(data(), rows_E, waiting)}
    if (tbe := fbgemm(size, device)) is not None:
        looked_up = [tbe(rows_E, offsets)]
        peers["FBGEMM"] = {
            "forward": lambda: tbe(rows_E, offsets),
            "backward": lambda: looked_up[0].backward(grads, retain_graph=True),
        }
    for peer, calls in peers.items():
        works |= {f"{peer} {way}": call for way, call in calls.items()}
    for work in works.values():  # compiles
        work()
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            taken[name].append(clock.seconds(work))
    medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
    found = {peer: (medians[f"{peer} forward"], medians[f"{peer} backward"]) for peer in peers}
    return Times(size, medians["lookup"], medians["order"], medians["update"], found)


def page(found: Sequence[Times], copied: float, device: torch.device) -> str:
    """All as Markdown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU, in Triton's interpreter: no speeds"
    lines = pages.heading("The Triton kernels", "benchmarks.gpu")
    lines += pages.paragraph(
        f"Device: {name}. Torch {torch.__version__}. A copy moves {copied / 1e9:,.0f} GB/s, read and written.",
        "Times in microseconds; ratios say how many times longer a peer takes, backward with our sort counted.",
    )
    peers = list(dict.fromkeys(peer for times in found for peer in times.peers))
    head = [
        "width, ids, skew",
        "lookup",
        "of copy",
        "sort",
        "update",
        *(f"{peer} {way}" for peer in peers for way in ("fwd", "bwd")),
    ]
    rows = []
    for times in found:
        size = times.size
        cells = [f"{size.width}, {size.ids}, {size.skew:g}", f"{times.lookup * 1e6:,.0f}", f"{times.bandwidth() / copied:.0%}"]
        cells += [f"{times.order * 1e6:,.0f}", f"{times.update * 1e6:,.0f}"]
        for peer in peers:
            cells += [f"{ratio:.2f}x" for ratio in times.ratios(peer)] if peer in times.peers else ["-", "-"]
        rows.append(cells)
    lines += [*pages.table(head, rows), ""]
    for peer in peers:
        ratios = [times.ratios(peer) for times in found if peer in times.peers]
        forward, backward = (pages.geometric_mean(column) for column in zip(*ratios, strict=True))
        lines.append(f"{peer}, geometric mean: forward {forward:.2f}x, backward {backward:.2f}x.")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 32, 64, 128, 256])
    parser.add_argument("--ids", type=int, nargs="+", default=[1, 10, 30, 100], help="ids a bag")
    parser.add_argument("--skews", type=float, nargs="+", default=[0.0, 1.05, 1.15], help="exponents of Zipf's law; 0: evenly")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--bags", type=int, default=65_536)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--flush", type=int, default=GIB // 4, help="bytes written before each measurement")
    parser.add_argument("--copy", type=int, default=GIB, help="bytes of the copy")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--markdown", type=Path, help="write the page here too")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu tries the logic in Triton's interpreter")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    clock = Clock(device, chosen.flush)
    copied = copy_bandwidth(device, clock, chosen.copy, chosen.rounds)
    cases = [(width, ids, skew) for width in chosen.widths for ids in chosen.ids for skew in chosen.skews]
    found = [measure(Size(chosen.rows, chosen.bags, *case), device, clock, chosen.rounds) for case in cases]
    text = page(found, copied, device)
    print(text)
    if chosen.markdown:
        chosen.markdown.write_text(text)


if __name__ == "__main__":
    main()
