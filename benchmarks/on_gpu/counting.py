"""How often a training step calls the driver, and how often the host waits there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import shardembed as se
from benchmarks.on_gpu.check import Here, NotSeenError

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")
FEW, MANY = 10, 80  # tables
MOST_WAITS = 2  # as tests/unit/journey/test_launches.py holds it


def launches(here: Here) -> Iterator[str]:
    """With more tables as many, and two waits at most."""
    if here.small:
        yield from _without_one()
        return
    for widths in (1, 10):
        few, many = (_step(here.device, tables, widths) for tables in (FEW, MANY))
        if not few["launches"] or not many["launches"]:
            raise NotSeenError("torch's profiler has seen no launch at all: it may not look at this GPU's driver (CUPTI)")
        for tables, found in ((FEW, few), (MANY, many)):
            yield f"{tables} tables of {widths} width(s): {found['launches']} launches, {found['waits']} waits of the host a step"
        assert few["waits"] <= MOST_WAITS >= many["waits"], f"the host waits more than {MOST_WAITS} times"
        # torch's own operators make a few launches more or less of other sizes.
        assert many["launches"] <= 1.25 * few["launches"] + 8, "launches grow with tables"


def _step(device: torch.device, tables: int, widths: int) -> dict[str, int]:
    from torch.profiler import ProfilerActivity, profile

    configs = [se.TableConfig(f"t{i}", 100_000, 16 + 8 * (i % widths)) for i in range(tables)]
    emb = se.EmbeddingCollection(configs, optimizer=se.optim.RowwiseAdagrad(0.1), device=device)
    optimizer = se.Optimizer(emb)
    # As many ids, whatever the number of tables.
    batch = {table.name: torch.randint(100_000, (64 * MANY // tables, 10), device=device) for table in configs}

    def step() -> None:
        emb(batch).concatenated().square().sum().backward()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        step()
    events: dict[str, int] = {}
    averages: Any = seen.key_averages()
    for event in averages:
        events[event.key] = event.count
    return {"launches": sum(events.get(name, 0) for name in LAUNCHES), "waits": sum(events.get(name, 0) for name in WAITS)}


def _without_one() -> Iterator[str]:
    """By `benchmarks.launches`, on the path that a GPU's tensors take."""
    from benchmarks.launches import count
    from benchmarks.own_work import Case

    for slabs in (1, 10):
        found = {}
        for tables, ranks in ((10, 2), (40, 2), (10, 16)):
            counted = count(Case(tables, slabs, 1000, max(3, 80 * slabs // tables), 1, "unique"), ranks)
            found[tables, ranks] = counted.operators, counted.host_syncs
        operators, waits = found[10, 2]
        assert len(set(found.values())) == 1, f"by tables and ranks, operators and waits: {found}"
        assert waits <= MOST_WAITS, f"the host waits {waits} times"
        yield f"{slabs} slab(s): {operators} operators and {waits} wait(s), of 10 or 40 tables on 2 or 16 ranks"
